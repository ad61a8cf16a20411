"""The screen says which site is out, why, since when, and whether the model gets better, in every width and height."""

import io
from typing import Any

import pytest
from rich.console import Console

from app.screen import Screen

NOW = 1_800_000_000.0  # 08:00:00 UTC


def site(name: str, **other: Any) -> dict[str, Any]:
    return {
        "name": name, "status": "online", "last_heartbeat": NOW - 5, "offline_since": None, "doing": None,
        "state": "completed", "reason": None, "round": 3, "since": NOW - 20, "train_loss": 1.7,
        "loss": 1.5, "base_loss": 3.0, "drops": {}, "samples_per_second": 24.5, "data_wait": 0.043,
        "gpu_memory_bytes": 6.1e9, "gpu_memory_total_bytes": 8.2e9, "disk_free_bytes": 220e9,
        "trainer_restarts": 0, **other,
    }  # fmt: skip


def one_round(number: int, loss: float | None, **other: Any) -> dict[str, Any]:
    return {
        "round": number, "result": "committed", "reason": None, "participation": 1.0, "loss": loss,
        "seconds": 12.34, "bytes_down": 2_000_000, "bytes_up": 1_000_000, **other,
    }  # fmt: skip


def document(*sites: dict[str, Any], rounds: Any = None, **run: Any) -> dict[str, Any]:
    return {
        "time": NOW, "federation": "fleet", "superlink": "online", "unreadable": 0,
        "run": {
            "name": "617", "model": "tiny", "started_at": NOW - 300, "ended": None, "round": 4,
            "rounds": 5, "round_timeout": 600.0, "phase": "collect", "phase_since": NOW - 8,
            "committed": 3, "best_round": 3, "loss": 1.5, "base_loss": 3.0, "best_loss": 1.5,
            "last_checkpoint_at": NOW - 30, **run,
        },
        "sites": list(sites) or [site("site-a"), site("site-b")],
        "rounds": [one_round(n, 3.0 - n / 2) for n in range(4)] if rounds is None else rounds,
    }  # fmt: skip


def shown(
    found: dict[str, Any], width: int = 80, height: int | None = None, lost: str | None = None
) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    options = console.options.update(height=height)
    lines = console.render_lines(Screen(found, NOW, lost), options, pad=False)
    texts = ["".join(segment.text for segment in line).rstrip() for line in lines]
    assert max(map(len, texts)) <= width
    return texts


def paragraph(lines: list[str]) -> str:
    """What stands between the head and the sites, in one line."""
    return " ".join(
        lines[lines.index("") + 1 : next(n for n, x in enumerate(lines) if x[:5] == "site ")]
    ).strip()


def test_a_healthy_run_in_80_columns() -> None:
    working = site("site-a", doing={"kind": "evaluate", "since": NOW - 12})
    assert shown(document(working, site("site-b", round=13))) == [
        "fleet  SuperLink online  2 of 2 sites online  08:00:00 UTC",
        "run 617  tiny  round 4 of 5, collect for 8 s",
        "█▆▃▁  getting better: held-out loss 1.500 (base model 3.000, -50.0 %), best in",
        "round 3",
        "",
        "site    status         doing          last round     loss   change  drops",
        "site-a  online         evaluate 12 s  3 completed   1.500  -50.0 %      -",
        "site-b  online         -              13 completed  1.500  -50.0 %      -",
        "",
        "round  result     sites   loss   change  seconds  MB to sites  MB from sites",
        "0      committed  100 %  3.000        -     12.3         2.00           1.00",
        "1      committed  100 %  2.500  -16.7 %     12.3         2.00           1.00",
        "2      committed  100 %  2.000  -33.3 %     12.3         2.00           1.00",
        "3      committed  100 %  1.500  -50.0 %     12.3         2.00           1.00",
    ]


def test_160_columns_say_more_of_each_machine() -> None:
    lines = shown(document(site("site-a", drops={"offline": 2, "error": 1})), 160)
    assert lines[4:6] == [
        "site    status         doing          last round     loss   change  drops  train loss  "
        "frames/s  waits      GPU GB  GB free  restarts     drops by reason",
        "site-a  online         -              3 completed   1.500  -50.0 %      3       1.700  "
        "    24.5    4 %  6.1 of 8.2    220.0         0  1 error, 2 offline",
    ]


def test_what_no_site_tells_takes_no_room() -> None:
    """Without a GPU, and in runs of a release that did not ask."""
    nothing = dict.fromkeys(("gpu_memory_bytes", "gpu_memory_total_bytes", "disk_free_bytes"))
    (heading,) = (x for x in shown(document(site("site-a", **nothing)), 160) if x[:5] == "site ")
    assert "frames/s" in heading
    assert "GPU" not in heading
    assert "free" not in heading


@pytest.mark.parametrize("width", [40, 60, 79, 80, 100, 160, 250])
def test_a_cell_is_whole_or_not_there(width: int) -> None:
    long = site(
        "a-site-with-a-name-of-the-greatest-length-that-a-dns-label-may-have", drops={"late": 9}
    )
    lines = shown(document(long, site("site-b")), width)
    (row,) = (line for line in lines if line.startswith("a-sit"))
    assert "online" in row
    assert ("…" in row) == (width < 160)
    assert not any("…" in line for line in lines if line != row)


def test_a_site_that_is_out_and_why_and_since_when() -> None:
    out = site(
        "site-b", status="offline", offline_since=NOW - 125, state="offline", round=4, since=NOW - 60,
        reason="no heartbeat for 60 s",
    )  # fmt: skip
    lines = shown(document(site("site-a"), out))
    assert lines[0].startswith("fleet  SuperLink online  1 of 2 sites online")
    assert paragraph(lines) == (
        "site-b: offline since 07:57:55 UTC (2 min); offline in round 4, 60 s ago: "
        "no heartbeat for 60 s"
    )
    assert "site-b  offline 2 min  -              4 offline     1.500  -50.0 %      -" in lines


def test_a_time_of_another_day_has_its_date() -> None:
    out = site("site-b", status="offline", offline_since=NOW - 2 * 86400)
    assert paragraph(shown(document(out))) == "site-b: offline since 2027-01-13 08:00 UTC (2 d)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"state": "error", "reason": "DatasetError: gone"}, "site-b: error in round 3, 20 s ago: DatasetError: gone"),
        ({"state": "invalid", "reason": None, "since": None}, "site-b: invalid in round 3"),
        ({"status": "unregistered"}, "site-b: no member any more"),
    ],
)  # fmt: skip
def test_what_else_is_wrong_with_a_site(change: dict[str, Any], sentence: str) -> None:
    assert paragraph(shown(document(site("site-b", **change)))) == sentence


@pytest.mark.parametrize("change", [{"state": "late"}, {"state": None, "round": None}])
def test_what_is_not_wrong_with_a_site(change: dict[str, Any]) -> None:
    assert paragraph(shown(document(site("site-b", **change)))) == ""


def test_a_site_that_was_never_online() -> None:
    new = site("lab-7", status="registered", last_heartbeat=None, state=None, round=None, loss=None)
    lines = shown(document(site("site-a"), new))
    assert "lab-7   never online   -              -                 -        -      -" in lines


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"ended": {"at": NOW - 180, "reason": "Model 'x' is gone."}}, "the run ended early: Model 'x' is gone."),
        ({"ended": {"at": NOW - 180, "reason": "early stopping"}}, ""),
        ({"phase_since": NOW - 1201}, "nothing has changed for 20 min, and a round may take 10 min: "
         "'vlafleet flwr ls' says whether the run goes on"),
        ({"phase_since": NOW - 1199}, ""),
        ({"phase_since": NOW - 9999, "ended": {"at": NOW, "reason": "completed"}}, ""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_run(run: dict[str, Any], sentence: str) -> None:
    assert paragraph(shown(document(**run))) == sentence


def test_what_is_wrong_with_the_last_round_and_with_what_is_asked() -> None:
    failed = one_round(
        4, None, result="failed", reason="0 valid updates where the quorum is 1", participation=0.0
    )
    found = document(rounds=[one_round(3, 1.5), failed]) | {
        "unreadable": 2,
        "superlink": "unreachable",
    }
    lines = shown(found, 120, lost="No answer for 4 s.")
    assert lines[0] == "fleet  SuperLink unreachable  2 sites  08:00:00 UTC"
    assert paragraph(lines) == (
        "No answer for 4 s. The SuperLink does not answer the exporter: who is online is not known. "
        "round 4 failed: 0 valid updates where the quorum is 1 "
        "2 of the runs cannot be read: the exporter's log names them"
    )
    assert "4      failed       0 %      -        -     12.3         2.00           1.00" in lines


def test_how_a_run_ended() -> None:
    ended = {"at": NOW - 180, "reason": "completed"}
    assert "run 617  tiny  completed 3 min ago, 3 of 5 rounds committed" in shown(
        document(ended=ended)
    )
    ended["reason"] = "Model 'x' is gone."
    assert "run 617  tiny  ended 3 min ago, 3 of 5 rounds committed" in shown(document(ended=ended))
    # A run of an older release says nothing of its phase.
    assert "run 617  tiny  round 4 of 5" in shown(document(phase=None, phase_since=None))


@pytest.mark.parametrize(
    ("run", "rounds", "sentence"),
    [
        ({"loss": None}, [], "held-out loss: not measured yet"),
        ({"loss": 3.0, "best_round": 0}, [one_round(0, 3.0)],
         "held-out loss 3.000, the base model's: no round is over yet"),
        ({"loss": 1.6, "best_round": 2}, None,
         "no better for 1 round: held-out loss 1.600 (base model 3.000, -46.7 %), best 1.500 in round 2"),
        ({"loss": 1.6, "best_round": 1}, None,
         "no better for 2 rounds: held-out loss 1.600 (base model 3.000, -46.7 %), best 1.500 in round 1"),
        ({"loss": 3.3, "best_round": 0}, None,
         "no better than the base model: held-out loss 3.300 (base model 3.000, +10.0 %)"),
        ({"base_loss": None, "best_round": None}, None, "held-out loss 1.500"),
    ],
)  # fmt: skip
def test_whether_the_model_gets_better(run: dict[str, Any], rounds: Any, sentence: str) -> None:
    lines = shown(document(rounds=rounds, **run), 160)
    assert lines[2].split("  ")[-1] == sentence


def test_without_a_run_there_are_the_sites() -> None:
    lines = shown(document(rounds=[]) | {"run": None})
    assert lines[1:3] == ["no run yet", ""]
    assert lines[-1].startswith("site-b  online")
    assert shown(document(rounds=[]) | {"run": None, "sites": []})[1:] == ["no run yet"]


@pytest.mark.parametrize("height", [10, 15, 24, 40, 60])
@pytest.mark.parametrize("count", [1, 12, 100])
def test_a_given_height_is_kept_and_what_is_wrong_comes_first(height: int, count: int) -> None:
    sites = [site(f"site-{number:03d}") for number in range(count)]
    sites[-1] |= {"status": "offline", "offline_since": NOW - 125}
    found = document(*sites, rounds=[one_round(n, 3.0 - n / 10) for n in range(10)])
    lines = shown(found, 80, height)
    assert len(lines) == height
    rows = [line.split()[0] for line in lines if line.startswith("site-") and ":" not in line]
    assert f"site-{count - 1:03d}" in rows
    assert f"site-{count - 1:03d}: offline since 07:57:55 UTC (2 min)" in lines
    left_out = count - len(rows)
    assert (f"and {left_out} more sites" in lines) == bool(left_out)
    assert left_out == 0 or height < 120


def test_many_troubles_leave_room_for_the_tables() -> None:
    broken = [
        site(f"site-{n:03d}", state="error", reason="DatasetError: a long story " * 8)
        for n in range(50)
    ]
    lines = shown(document(*broken), 80, 24)
    assert len(lines) == 24
    assert "and 48 more" in lines or "and 49 more" in lines
    assert sum(line.startswith("site-") and ":" not in line for line in lines) >= 3
    # Without a height there is all of it.
    assert sum(line.startswith("site-") and ":" in line for line in shown(document(*broken))) == 50


def test_no_text_moves_the_cursor_or_is_taken_for_markup() -> None:
    told = site("site-b", state="error", reason="\x1b[2J\x1b]0;mine\x07 [red]gone[/red] \u202e")
    (line,) = (x for x in shown(document(told), 160) if x.startswith("site-b:"))
    assert line.endswith(":  [2J ]0;mine  [red]gone[/red]")


@pytest.mark.parametrize("colour", [True, False])
def test_colour_is_for_terminals(colour: bool) -> None:
    file = io.StringIO()
    system: Any = "standard" if colour else "auto"
    Console(file=file, force_terminal=colour, width=80, color_system=system).print(
        Screen(document(site("site-b", status="offline")), NOW)
    )
    assert ("\x1b[" in file.getvalue()) == colour


def test_a_terminal_of_ascii_gets_no_bars() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file=file, width=80).print(Screen(document(), NOW))
    file.flush()
