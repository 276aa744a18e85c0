"""The coordinate check: flat under muP, sloping without, and refusals."""

import json
import sys

import pytest

from nanojaxgpt.config import typed
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.papers.coordcheck import check_coordinates, save_coordinates, slope, table, widened


@pytest.mark.slow
def test_activations_stay_with_the_width_under_mup_alone(small_config, tmp_path):
    cfg = small_config(**{
        "model.num_heads": "4", "model.num_kv_heads": "2", "optim.schedule": "constant",
        "optim.learning_rate": "0.01", "optim.warmup_steps": "0", "model.num_layers": "1",
    })  # fmt: skip
    result = check_coordinates(cfg, (32, 128), 2, report=lambda _: None)
    for layer in ("layer 1", "logits"):
        assert max(map(abs, result["slopes"]["mup"][layer][1:])) < 0.25
        assert min(result["slopes"]["standard"][layer][1:]) > 0.3
    lines = list(table(result))
    assert [line.split()[0] for line in lines[::3]] == ["mup", "standard"]
    path = save_coordinates(result, tmp_path / "check")
    assert path.stat().st_size > 10_000
    assert json.loads(path.with_suffix(".json").read_text())["base"] == 32


def test_without_matplotlib_the_numbers_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = save_coordinates({"sizes": {}}, tmp_path / "check")
    assert path.name == "coordcheck.json"
    assert json.loads(path.read_text()) == {"sizes": {}}
    assert "no coordcheck.png: matplotlib is not installed" in capsys.readouterr().err
    assert [one.name for one in path.parent.iterdir()] == ["coordcheck.json"]


def test_slope_is_the_power_of_the_width():
    assert slope([2, 4, 8], [3, 12, 48]) == pytest.approx(2)


def test_widths_keep_the_shape_of_a_head(small_config):
    cfg = typed(small_config(**{"model.num_heads": "4", "model.num_kv_heads": "2"}))
    model = widened(cfg, 48, 16).model
    assert (model.num_heads, model.num_kv_heads, model.head_dim, model.mup_base_dim) == (
        12,
        6,
        4,
        16,
    )
    with pytest.raises(ConfigError, match="not divisible by the head size, 4"):
        widened(cfg, 30, 0)
    with pytest.raises(ConfigError, match="not divisible by the group size, 2"):
        widened(cfg, 12, 0)
    with pytest.raises(ConfigError, match="two widths"):
        check_coordinates(cfg, (64,), 1)
