"""The verdicts of benchmarks: bounds, exit codes, refusal on a busy machine."""

import json
from argparse import ArgumentParser

import pytest

from flux2_pack.tests.bench import report

KEYS = ["name", "case", "metric", "value", "unit", "peer", "ratio", "device", "torch", "commit"]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A report with these options, on a machine whose other programs use so many cores."""

    def make(*arguments, others=0.0):
        monkeypatch.setattr(report, "others_over", lambda call: call() or others)
        monkeypatch.setattr(report.time, "sleep", lambda _: None)
        monkeypatch.setattr(report.psutil, "cpu_count", lambda: 2)
        parser = ArgumentParser()
        report.options(parser)
        file = tmp_path / "lines.jsonl"
        return report.Report("test", parser.parse_args([*arguments, "--json", str(file)])), file

    return make


def code(call) -> int:
    with pytest.raises(SystemExit) as stopped:
        call()
    return stopped.value.code


@pytest.mark.parametrize(
    ("bound", "required", "met"),
    [
        ({"at_most": 1.1}, "<= 1.1", True),
        ({"at_most": 1.0}, "<= 1", False),
        ({"at_least": 1.05}, ">= 1.05", True),
        ({"at_least": 2}, ">= 2", False),
    ],
)
def test_bounds(make, capsys, bound, required, met):
    out, file = make()
    out.add("a case", "a figure", 1.05, "s", peer="other", ratio=0.5, **bound)
    assert code(out.finish) == (0 if met else 1)
    line = json.loads(file.read_text())
    assert list(line) == [*KEYS, "required", "met"]
    assert (line["required"], line["met"]) == (required, met)
    printed, errors = capsys.readouterr()
    assert json.loads(printed) == line
    assert ("a case: a figure is 1.05 s, required" in errors) != met


def test_nan_meets_nothing(make):
    out, _ = make()
    out.add("a case", "a figure", float("nan"), "s", at_most=1.0)
    assert code(out.finish) == 1


def test_no_bound_no_verdict(make):
    out, file = make()
    out.add("a case", "a figure", 3.0, "%")
    assert code(out.finish) == 0
    assert list(json.loads(file.read_text())) == KEYS


def test_rounds_are_interleaved(make):
    out, file = make()
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = out.interleaved(calls, 3)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc"
    assert all(len(t) == 3 for t in times.values())
    assert code(out.finish) == 0
    assert json.loads(file.read_text())["case"] == "machine"


def test_a_busy_machine_is_refused(make, capsys):
    out, _ = make(others=1.0)
    assert code(lambda: out.interleaved({"a": lambda: None}, 1)) == 2
    assert "other programs use 1.0 of its 2 cores" in capsys.readouterr().err
    out, _ = make("--force", others=1.0)
    assert len(out.interleaved({"a": lambda: None}, 2)["a"]) == 2


def test_ratio_is_taken_round_by_round():
    assert report.ratio([1, 4, 3], [2, 8, 3]) == 0.5  # of medians: 1.0
