"""Files on disk: untrusted files are read, files are written whole, and arrays are verified."""
