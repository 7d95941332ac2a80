"""Hooks of `mkdocs build`: pages made of files that lie outside docs/, and the links to them.

The README, the notes and the notebooks are pages of the site without being copied. A link is written as the
repository needs it (`../README.md`), so that it works there too, and is turned into that of the page.
"""

import json
import os.path
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).parent
PAGES = {"README.md": "readme.md", "BUILD_NOTES.md": "build_notes.md", "CHANGELOG.md": "changelog.md"}
PAGES |= {f"notebooks/{path.name}": f"notebooks/{path.stem}.md" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
ORIGINS = {page: origin for origin, page in PAGES.items()}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


def on_files(files, config):
    """Adds the pages; each notebook also as a file to download."""
    for origin, page in PAGES.items():
        text = (ROOT / origin).read_text(encoding="utf-8")
        if origin.endswith(".ipynb"):
            files.append(File.generated(config, origin, abs_src_path=str(ROOT / origin)))
            text = notebook_page(json.loads(text), pathlib.PurePosixPath(origin).name)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Turns links between files of the repository into links between pages."""
    here = page.file.src_uri
    folder = os.path.dirname(ORIGINS.get(here, f"docs/{here}"))

    def replaced(match):
        target = os.path.normpath(os.path.join(folder, match[2]))
        if (ROOT / target).is_dir():
            target += "/README.md"
        if target in PAGES:
            target = PAGES[target]
        elif here in ORIGINS and target.startswith("docs/"):
            target = target.removeprefix("docs/")
        else:
            return match[0]
        return f"{match[1]}{os.path.relpath(target, os.path.dirname(here) or '.')}{match[3] or ''}{match[4]}"

    # code, where ](...) may be an index and a call, stays as it is
    parts = re.split(r"(^```.*?^```$|`[^`\n]*`)", markdown, flags=re.M | re.S)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def notebook_page(notebook, name):
    """The Markdown of a notebook with its saved outputs, and a link to the file itself."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = "".join(output.get("text", ()) or data.get("text/plain", ()))
            if "image/png" in data:
                parts.append(f"![Figure](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join([*parts, f"[Download this notebook]({name}){{download}}"])
