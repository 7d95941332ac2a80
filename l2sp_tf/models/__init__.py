"""Networks, their files, and what is done to them."""
