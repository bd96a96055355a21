"""The pages hang together: every one is in the table of contents, every link and reference leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_builder.autodoc import find_object_in_package
from doc_builder.build_doc import build_doc
from doc_builder.external import EXTERNAL_DOC_OBJECTS_CACHE, HUGGINFACE_LIBS

import voco_llama_hf


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "source"
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What `make docs` builds; a page that is not in the table of contents, and the other way round, is an error."""
    target = tmp_path_factory.mktemp("site")
    # Links to the documentation of other packages come from the network
    EXTERNAL_DOC_OBJECTS_CACHE.update({name: {} for name in HUGGINFACE_LIBS})
    build_doc("voco_llama_hf", SOURCE, target, version="main", is_python_module=True)
    return target


def test_references_are_resolved(site):
    pages = {path.relative_to(site).as_posix(): path.read_text() for path in site.rglob("*.mdx")}
    assert len(pages) == len(list(SOURCE.rglob("*.md")))
    for name, text in pages.items():
        assert "[[autodoc]]" not in text, name
    assert "Keys of the VoCo tokens of all images" in pages["package_reference/cache.mdx"]
    assert "Weight of the attention distillation" in pages["package_reference/training.mdx"]
    # Names of our own objects in docstrings are links to their pages
    assert "package_reference/cache#voco_llama_hf.VoCoCache)" in pages["package_reference/model.mdx"]


def test_documented_objects_say_what_they_are():
    for page in (SOURCE / "package_reference").glob("*.md"):
        for name, methods in re.findall(r"\[\[autodoc\]\] (\S+)\n((?:    - \S+\n)*)", page.read_text()):
            documented = find_object_in_package(name, voco_llama_hf)
            for part in [documented, *(getattr(documented, method) for method in methods.replace("-", "").split())]:
                assert part.__doc__, f"{name} in {page.name}: {part}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(SOURCE.rglob("*.md"))], ids=lambda path: path.stem)
def test_links(path):
    for target, anchor in LINK.findall(path.read_text()):
        page = path.parent / target if target else path
        assert page.is_file(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(page), f"{path.name} links to {target}#{anchor}"


def test_command_line_page_is_up_to_date():
    command = [sys.executable, "-m", "typer", "voco_llama_cli", "utils", "docs", "--name", "voco-llama"]
    result = subprocess.run(
        [*command, "--title", "Command line"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == (SOURCE / "package_reference" / "cli.md").read_text().strip(), "run make docs"
