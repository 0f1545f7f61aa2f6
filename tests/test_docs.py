"""The pages in docs/ name what the code has."""

import pathlib
import re

import pytest

from jaxdiff.config import Config, flatten
from jaxdiff.data.sources import SOURCES
from jaxdiff.diffusion.predictions import PREDICTIONS
from jaxdiff.diffusion.samplers import SAMPLERS, VARIANCES
from jaxdiff.diffusion.scheduler import BETAS
from jaxdiff.diffusion.timesteps import SPACINGS
from jaxdiff.losses import LOSSES

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def test_config_page_has_every_key_with_its_default_and_no_other():
    rows = re.findall(r"^\| `([a-z0-9_.]+)` \| `(.*?)` \| \S.* \|$", (ROOT / "docs/config.md").read_text(), re.M)
    assert dict(rows) == {key: repr(value) for key, value in flatten(Config()).items()}
    assert len(rows) == len(dict(rows))


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("maths.md", [*SAMPLERS, *PREDICTIONS, *LOSSES, *SPACINGS, *VARIANCES, *BETAS]),
        ("config.md", [*SAMPLERS, *PREDICTIONS, *LOSSES, *SPACINGS, *VARIANCES, *BETAS, *SOURCES]),
        ("data.md", SOURCES),
    ],
)
def test_page_names_everything_there_is(page, names):
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """Paths in backticks that begin with one of the repository's folders."""
    pattern = r"`((?:jaxdiff|configs|docs|tests|notebooks|benchmarks)/[\w/.]+)`"
    assert [path for path in re.findall(pattern, page.read_text()) if not (ROOT / path).exists()] == []


def test_index_lists_every_page():
    docs = ROOT / "docs"
    index = (docs / "README.md").read_text()
    assert all(f"({page.relative_to(docs)})" in index for page in docs.rglob("*.md") if page.name != "README.md")
