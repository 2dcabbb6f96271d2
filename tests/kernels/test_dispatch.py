"""Which implementation runs: by what was measured on a card, and without measurements."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lowrank_cases import Shape, assert_equals_definition
from svdserve.kernels import NoImplementation, lowrank_linear, operation, prepare
from svdserve.kernels.products import TwoProducts
from svdserve.kernels.registry import (
    OVERRIDE,
    Implementation,
    Request,
    choose,
    reasons_against,
    what_decides,
)
from svdserve.kernels.triton import table as tables
from svdserve.kernels.triton.configs import (
    GUESSES,
    PRODUCTS,
    Config,
    Plan,
    Tile,
    config_for,
    from_text,
    single,
    to_text,
)
from svdserve.kernels.triton.table import Entry, Table, file_of, read_table, table_of
from triton_run import Job, run

ROOT = Path(__file__).resolve().parents[2]
SMALL = Tile(16, 16, 64, warps=2, stages=3)
# The single launch up to 16 rows, two launches up to 32, the two products above.
PLAN: Plan = (single(16, SMALL), Config(32, SMALL, SMALL), PRODUCTS)


def table(*entries: Entry) -> Table:
    return Table(card="a card", machine={"torch": "2"}, entries=entries)


MEASURED = table(
    Entry(dtype="bfloat16", columns=(900, 13000), plan=PLAN),
    Entry(dtype="float32", columns=(8, 100), plan=PLAN),
    Entry(dtype="float16", columns=(900, 13000), plan=(Config(16), PRODUCTS)),
)


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def request(
    dtype: torch.dtype = torch.bfloat16,
    columns: tuple[int, ...] = (1824, 2272),
    prepared: bool = True,
    rows: int | None = None,
) -> Request:
    return Request("cuda", dtype, columns, prepared, rows=rows)


def test_a_card_without_a_table_gets_the_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "FOLDER", Path("/nothing/here"))
    for prepared, rows in ((True, None), (False, 1)):
        asked = request(prepared=prepared, rows=rows)
        assert choose(asked).name == "torch"
        pytest.importorskip("triton")
        assert "has no table" in reasons_against(asked)["triton"]
        assert choose(asked, "triton").name == "triton"
        assert "triton" not in reasons_against(asked, "triton")
    monkeypatch.setenv(OVERRIDE, "triton")
    assert choose(request()).name == "triton"
    assert "triton" not in reasons_against(request())


def test_a_table_gives_triton_the_layers_and_rows_that_it_won() -> None:
    pytest.importorskip("triton")

    def name(*arguments: Any, **named: Any) -> str:
        return choose(request(*arguments, **named), table=MEASURED).name

    assert name() == "triton"
    assert name(columns=(900, 13000, 1000, 1000)) == "triton"  # several parts
    for rows, expected in ((1, "triton"), (16, "triton"), (32, "triton"), (33, "torch")):
        assert name(prepared=False, rows=rows) == expected
    # Fewer or more columns than were measured, a dtype that lost, one that was not measured.
    assert name(columns=(899, 2272)) == name(columns=(1824, 13001)) == "torch"
    assert name(torch.float16) == "torch"
    assert name(torch.float32) == "torch"
    reasons = reasons_against(request(torch.float16), table=MEASURED)
    assert reasons["triton"] == "did not win, or was not measured, for such layers on a card"
    reasons = reasons_against(request(rows=40), table=MEASURED)
    assert reasons["triton"] == "did not win for 40 rows on a card"


def test_the_processor_needs_no_table() -> None:
    """The fused kernel was measured and stays; a table of a card says nothing about it."""
    part = Shape(16, 32, 8).part(torch.bfloat16)
    plain, by_table = prepare([part]), prepare([part], table=MEASURED)
    assert type(plain) is type(by_table)
    assert isinstance(prepare([Shape(16, 32, 8).part(torch.float32)]), TwoProducts)


def test_a_table_is_found_by_the_name_of_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    assert file_of("NVIDIA H100 80GB HBM3") == tmp_path / "NVIDIA_H100_80GB_HBM3.json"
    file_of("a card").write_text(MEASURED.model_dump_json())
    file_of("damaged").write_text('{"card": "damaged"}')
    names = iter(["a card", "another card", "damaged"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: next(names))
    tables._table_of_card.cache_clear()
    assert table_of("cuda") == MEASURED
    assert table_of("cuda") is None
    with pytest.raises(ValidationError, match="machine"):
        table_of("cuda")
    assert table_of("cpu") is None
    tables._table_of_card.cache_clear()


def test_what_decides_names_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled graphs hold plans, so a cache of them must know the table."""
    first = what_decides("cuda", torch.bfloat16)
    assert json.loads(json.dumps(first)) == first
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables._table_of_card.cache_clear()
    file_of("a card").write_text(MEASURED.model_dump_json())
    second = what_decides("cuda", torch.bfloat16)
    tables._table_of_card.cache_clear()
    assert json.loads(json.dumps(second)) == second
    assert Table.model_validate(second["table"]) == MEASURED
    assert {key for key in first if first[key] != second[key]} == {"table"}
    monkeypatch.setenv(OVERRIDE, "torch")
    assert what_decides("cpu", torch.bfloat16)["override"] == "torch"


def test_every_table_that_is_shipped_can_be_read_and_has_the_name_of_its_card() -> None:
    for file in tables.FOLDER.glob("*"):
        assert file_of(read_table(file).card) == file


def test_plans_that_cannot_run_are_refused() -> None:
    for plan, message in (
        ((), "the last configuration"),
        ((Config(16),), "the last configuration"),
        ((PRODUCTS, PRODUCTS), "the last configuration"),
        ((Config(32), Config(16), PRODUCTS), r"must ascend, found \[32, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            to_text(plan)
        with pytest.raises(ValidationError, match=message):
            Entry(dtype="bfloat16", columns=(1, 2), plan=plan)
    with pytest.raises(ValueError, match="give both one, or neither"):
        Config(16, SMALL)
    with pytest.raises(ValueError, match="17 rows; tiles of 16 take 16 in one launch"):
        single(17, SMALL)
    with pytest.raises(ValueError, match="any number of rows; tiles of 16 take 128"):
        Config(None, Tile(16, 16, 64, 2, 3, splits=2), SMALL)
    with pytest.raises(ValidationError, match="greater than 0"):
        Tile(0, 16, 64, 2, 3)
    for plan in (PLAN, *GUESSES.values()):
        assert from_text(to_text(plan)) == plan
    limits = [config_for(PLAN, rows).rows for rows in (0, 1, 16, 17, 32, 33, 1 << 40)]
    assert limits == [16, 16, 16, 32, 32, None, None]


def test_an_unknown_name_is_an_error_with_every_reason() -> None:
    with pytest.raises(NoImplementation, match=r"cpu is for cpu; .*torch can"):
        choose(request(), "nothing", MEASURED)


# float32, which the fused kernel of the processor leaves to others.
TABLED = [
    Job((Shape(24, 48, 16),), rows, torch.float32, compiled=rows == 33, table="by table")
    for rows in (0, 1, 16, 17, 32, 33)
]
TABLED.append(
    Job((Shape(24, 64, 20), Shape(8, 64, 9)), 5, torch.float32, table="by table")  # q and k
)
TABLED.append(Job((Shape(24, 200, 16),), 5, torch.float32, table="by table"))  # too many columns
LAUNCHED = [
    set(), {"shrink_expand"}, {"shrink_expand"}, {"shrink", "expand"}, {"shrink", "expand"}, set(),
    {"shrink_expand"}, set(),
]  # fmt: skip


def test_a_prepared_layer_runs_by_the_plan_of_a_table(tmp_path: Path) -> None:
    """In the interpreter: this kernel up to so many rows, that one, then the two products."""
    pytest.importorskip("triton")
    jobs = [replace(job, table=MEASURED.model_dump_json()) for job in TABLED]
    found = run(tmp_path, jobs)
    assert found.kernels == LAUNCHED
    for job, first, second in zip(jobs, found.first, found.second, strict=True):
        x, bias = job.arguments()
        assert_equals_definition(first, x, job.parts(), bias)
        assert torch.equal(first, second)


def test_the_suite_writes_a_table_that_dispatch_reads(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out, written = tmp_path / "gpu.json", tmp_path / "tables" / "card.json"
    command = [
        sys.executable, str(ROOT / "benchmarks/gpu/suite.py"), "--dry", "--out", str(out),
        "--table", str(written), "--parts", "kernels", "linear_algebra",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["failed"] == report["correctness"]["wrong"] == {}
    assert report["linear_algebra"]
    (entry,) = read_table(written).entries
    assert entry == Entry.model_validate(report["tuning"]["chosen"])
    costs = report["tuning"]["microseconds_of_the_block"]["16"]
    wins = min(costs.values()) < costs["products"]
    assert (entry.plan[0].shrink is not None) == wins  # a kernel only where it was faster
    assert entry.plan[-1] == PRODUCTS


def test_a_call_is_chosen_by_the_rows_of_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def recording(request: Request, *rest: Any) -> Implementation:
        asked.append(request.rows)
        return choose(request, *rest)

    monkeypatch.setattr(operation, "choose", recording)
    part = Shape(16, 32, 8).part(torch.float32)
    for shape in ((0, 32), (1, 32), (2, 3, 32), (32,)):
        lowrank_linear(torch.ones(shape), *part)
    prepare([part])
    assert asked == [0, 1, 6, 1, None]
