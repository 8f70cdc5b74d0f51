"""The report: one file, everything in it, nothing that could run or load anything else."""

from __future__ import annotations

import base64
import html.parser
import re
import struct
from pathlib import Path

import pytest
import torch

from jepa_fast.eval import MaskExample, ProbeComparison, WordMap, figures, write_report
from jepa_fast.eval.report import installed_versions

ROWS = [
    {
        "step": 10,
        "epoch": 0.5,
        "loss": 0.9,
        "prediction_loss": 0.8,
        "target_rank": 5.0,
        "odd_one": 1.0,
    },
    {"step": 20, "epoch": 1.0, "loss": None, "prediction_loss": 0.4, "target_rank": 7.0},
    {"step": 30, "epoch": 1.5, "loss": 0.5, "prediction_loss": 0.3, "images_per_second": 400.0},
]


class Tags(html.parser.HTMLParser):
    """Collects the tags, their addresses and the text of a page; open tags must be closed."""

    VOID = ("meta", "img", "source")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def size(address: str) -> tuple[int, int]:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"), validate=True)
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Tags:
    image = torch.rand(3, 8, 8)
    masks = MaskExample(image, torch.tensor([0, 1]), torch.tensor([[2, 3], [3, 7]]), (4, 4))
    words = WordMap(image, ["a", "<seven>"], torch.rand(16, 2), (4, 4), "a <seven>")
    path = write_report(
        tmp_path_factory.mktemp("report") / "report.html",
        title="Run <script>alert(1)</script>",
        rows=ROWS,
        probes=[ProbeComparison("knn", 0.5, (0.3, 0.4)), ProbeComparison("patch", 0.2, (0.3, 0.4))],
        masks=[masks],
        word_maps=[words],
        findings=[(True, "the loss fell"), (False, "a & b")],
        notes=["2 samples skipped: <x>"],
        config={"model": {"encoder": "vit", "depth": 2}, "seed": 0},
        versions={"torch": "9.9"},
        limits={"target_rank": 4.0},
    )
    return Tags(path.read_text("utf-8"))


def test_everything_is_inside_and_nothing_runs(page: Tags) -> None:
    assert not page.open
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert all(size(address)[0] > 50 for address in page.addresses)
    # Loss, rank and throughput, and one more curve, each light and dark; two pictures of the masks;
    # the image and a map for each of two words.
    assert len(page.addresses) == 2 * 4 + 2 + 3
    style = page.text[page.text.index(":root") :]
    assert "url(" not in style
    assert "prefers-color-scheme: dark" in style


def test_the_page_says_what_it_was_given(page: Tags) -> None:
    for text in (
        "Run <script>alert(1)</script>",
        "✓ the loss fell",
        "✗ a & b",
        "2 samples skipped: <x>",
        "<seven>",
        "model.encoder",
        "9.9",
        "50.0%",
        "35.0% ± 7.1",
        "30.0% to 40.0%, 2 seeds",
        "+15.0",
        "-15.0",
        "from 0.900",
        "Odd one",
    ):
        assert text in page.text, text


def test_an_almost_empty_report(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="Nothing yet")
    page = Tags(path.read_text("utf-8"))
    assert not page.addresses
    assert "Training" not in page.text
    assert re.search(r"torch\s*\d+\.\d+", page.text)
    one_row = write_report(tmp_path / "r.html", title="One row", rows=ROWS[:1])
    assert len(Tags(one_row.read_text("utf-8")).addresses) == 2 * 3


def test_pictures() -> None:
    image = torch.rand(3, 8, 16)
    width, height = size(figures.plain_image(image))
    assert width == 2 * height
    masks = MaskExample(image, torch.tensor([0]), torch.tensor([[1], [5]]), (2, 4))
    assert size(figures.masked_image(masks)) == (width, height)
    words = WordMap(image, ["x"], torch.zeros(8, 1), (2, 4))
    assert size(figures.word_image(words, 0)) == (width, height)


def test_versions() -> None:
    versions = installed_versions()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"jepa-fast", "python", "machine"} <= set(versions)


def test_errors_name_the_argument(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"similarity must be \[patches, words\] = \[4, 2\]"):
        WordMap(torch.rand(3, 4, 4), ["a", "b"], torch.rand(4, 3), (2, 2))
    with pytest.raises(ValueError, match='rows must each have a "step"'):
        write_report(tmp_path / "r.html", title="x", rows=[{"loss": 1.0}])
    with pytest.raises(ValueError, match=r"probes: expected them beside .*, got knn alone"):
        write_report(tmp_path / "r.html", title="x", probes=[ProbeComparison("knn", 0.5, ())])
