"""A run on paper: what it says of cards that are not here, and what it refuses."""

import re

import pytest

from bench import cli, plan_run


def lines(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    plan_run.main(flags)
    return capsys.readouterr().out.splitlines()


def test_a_run_on_eight_cards(capsys):
    plan, *rest = lines(capsys, "--preset", "fineweb-124m", "--cards", "8xH100", "--price", "3")
    said = dict(line.split(": ", 1) for line in rest)
    assert plan.startswith("plan: cuda (H100), ops triton")
    assert said["tokens"] == "9,999,745,024 in 19,073 steps of 524,288"
    one = float(said["tokens per second"].split()[0].replace(",", ""))
    assert "measured on NVIDIA H100" in said["tokens per second"]
    hours = 9_999_745_024 / (8 * one) / 3600
    assert said["hours"].startswith(f"{hours:.1f} ")
    assert said["cost"] == f"{8 * 3 * hours:,.0f} at 3 per card and hour"
    assert said["checkpoints"].startswith("1.49 GB each")  # 12 bytes of 124,439,808 parameters
    assert said["shards"].startswith("20.0 GB")


def test_what_was_not_measured_is_called_an_estimate(capsys):
    plan, *rest = lines(capsys, "--model", "1558m", "--cards", "8xL4")
    assert "AdamW's state sharded over the ranks" in plan
    assert "one card (estimate: " in rest[1]
    assert "times 8 (estimate: nothing lost between them)" in rest[1]
    (one,) = (line for line in lines(capsys, "--cards", "H100") if "tokens per second" in line)
    assert "times" not in one


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--cards", "3xH100"], "512 rows per step .* do not divide among 3 ranks"),
        (["--cards", "8xTPU"], "--cards must be like 8xH100, of B200.*, got 8xTPU"),
        (["--cards", "0xH100"], "got 0xH100"),
        (["--cards", "RTX 4090", "--model", "1558m"], "memory: one row of 1558m .* RTX 4090 has"),
        (["--preset", "nope"], "preset: unknown recipe 'nope'"),
        (["--model", "nope"], "nope"),
        (["--price", "-1"], "--price: must be more than 0"),
    ],
)
def test_what_cannot_be_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: plan_run.main(flags))
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert re.search(line, error), error
