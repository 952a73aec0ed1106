"""lab_shared.report_files: JSON objects, flat settings, figures with their numbers."""

import csv

import numpy as np
import pytest
from lab_shared.errors import UserError
from lab_shared.page import Page
from lab_shared.plotting import axes
from lab_shared.report_files import csv_text, flat_rows, keep_figure, read_object


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[1]", "no JSON object"), ('{"a": 1}', "lacks b, c"), ("[" * 100_000, "not valid JSON")],
)
def test_a_file_that_is_no_object_is_named(tmp_path, text, says):
    path = tmp_path / "facts.json"
    assert read_object(path) is None
    path.write_text(text)
    with pytest.raises(UserError, match=rf"facts\.json.*{says}"):
        read_object(path, ("a", "b", "c"))


def test_settings_become_rows():
    settings = {"optim": {"lr": 1e-3, "betas": [0.9, 0.95]}, "data": None, "fast": True}
    assert flat_rows(settings) == [
        ("optim.lr", "0.001"),
        ("optim.betas", "0.9 0.95"),
        ("data", "–"),
        ("fast", "True"),
    ]


def test_columns_keep_every_digit_and_one_length():
    columns = {"x": np.array([0.1, 1 / 3]), "name": ["a, b", "c"]}
    rows = list(csv.reader(csv_text(columns).splitlines()))
    assert rows == [["x", "name"], ["0.1", "a, b"], [repr(1 / 3), "c"]]
    with pytest.raises(ValueError, match="shorter"):
        csv_text({"x": [1, 2], "y": [1]})


def test_a_figure_stands_on_the_page_and_beside_its_numbers(tmp_path):
    page = Page("title")
    figure, ax = axes()
    ax.plot([1, 2], [3, 4])
    keep_figure(page, tmp_path / "figures", "line", figure, {"x": [1, 2], "y": [3, 4]}, "A line.")
    assert (tmp_path / "figures/line.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "figures/line.csv").read_text() == "x,y\n1,3\n2,4\n"
    assert "A line." in page.render()
