"""What of the site is written elsewhere: README.md, CHANGELOG.md, CONTRIBUTING.md and the notebook as pages.

    mkdocs build               calls on_files and on_page_markdown; the notebook is executed
    python docs/pages.py       executes the notebook and writes its outputs into it

A link is written as it is on the repository's own pages, `docs/gpu.md` in the README and `../README.md` in a
guide, and becomes the page of the site.
"""

import base64
import json
import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "example.ipynb"
# Files of the repository that are pages: what the site calls them.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
LINK = re.compile(r"\]\(([^)#\s]+)")
TIMEOUT_S = 300


def linked(markdown: str) -> str:
    """`markdown` of the repository with its links to files as those of the site's pages."""

    def target(match: re.Match[str]) -> str:
        path = match[1].removeprefix("../").removeprefix("docs/")
        return f"]({PAGES.get(path, path.replace('.ipynb', '.md'))}"

    return LINK.sub(target, markdown)


def executed(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of now, progress left out; raises where a cell does."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, record_timing=False)
    with tempfile.TemporaryDirectory() as folder:
        client.execute(cwd=folder)
    result = json.loads(nbformat.writes(notebook))
    for cell in result["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _kept(cell["outputs"])
    result["metadata"]["language_info"] = {"name": "python"}
    return result


def _kept(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Outputs without progress, what was printed as one."""
    kept: list[dict[str, Any]] = []
    for output in outputs:
        is_printed = output["output_type"] == "stream"
        if is_printed and output["name"] == "stderr":
            continue
        if is_printed and kept and kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    return kept


def page_of(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """(markdown, {name: picture}) of a notebook: its cells one after another, outputs below their code."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if picture := data.get("image/png"):
                name = f"example-{len(pictures)}.png"
                pictures[name] = base64.b64decode(picture)
                parts.append(f"![what the cell draws]({name})")
            elif table := data.get("text/html"):
                parts.append("".join(table))
            elif text := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that lie outside docs/, and the notebook's."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        text = linked((ROOT / name).read_text())
        files.append(File.generated(config, page, content=text))
    text, pictures = page_of(executed(NOTEBOOK))
    files.append(File.generated(config, "example.md", content=text))
    for name, content in pictures.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of a guide to pages outside docs/."""
    return linked(markdown)


def main() -> None:
    """Writes the notebook's outputs into it."""
    notebook = executed(NOTEBOOK)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
