"""The HTML page of every report."""

import re

import torch

from diffusers_med3d import viz


def test_a_page_needs_no_other_file_and_escapes_what_it_is_given():
    picture = viz.Picture(viz.orthogonal_views(torch.rand(8, 8, 8)), "middle <slices>")
    rows = [[k, "<b>"] for k in range(501)]
    page = viz.html_page("A & B", [viz.Section("Counts", ["1 < 2"], ["k", "v"], rows, [picture], "run --x 'y'")])
    assert "A &amp; B" in page and "1 &lt; 2" in page and "<b>" not in page and "middle &lt;slices&gt;" in page
    assert "... and 1 more" in page and "<td>499</td>" in page and "<td>500</td>" not in page
    assert re.findall(r'src="([^"]{22})', page) == ["data:image/png;base64,"]
    assert "http" not in page and "<link" not in page and "<script" not in page
