"""The documentation tells what the code does: what can be held against the code is."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from docs import generate
from jef_daemon import config
from jef_daemon.actions.output import Output, Patterns
from jef_daemon.errors import ExecutorError, ExitCode, RequestRefused, SettingsError
from jef_daemon.lifecycle import TABLE, Status
from jef_daemon.lock import wire
from jef_daemon.lock.requests import Acquire, Answer, Expire, Refused, Release, Reply
from jef_daemon.lock.state import Mode
from jef_daemon.metrics import DEFINITIONS, FAMILIES, Definition
from jef_daemon.run.catalogue import load, specs
from jef_daemon.schemas import WIRE_MODELS
from jef_daemon.settings import Settings
from jef_daemon.testing.locks import MemoryLocks
from tests.unit.test_schemas import check, schemas

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- what is generated -----------------------------------------------------------------------------------


MODELS = {model.__name__: model for model in WIRE_MODELS}


@pytest.mark.parametrize("path", generate.PAGES, ids=lambda path: path.name)
def test_generated_parts_are_up_to_date(path: Path) -> None:
    """`make docs` writes them."""
    text = path.read_text(encoding="utf-8")
    assert "generated: " in text
    assert text == generate.rewrite(text)


def test_a_stale_part_is_seen_and_the_rest_is_left_alone() -> None:
    stale = "before\n<!-- generated: topology -->\nold\n<!-- end of generated -->\nbehind\n"
    fresh = generate.rewrite(stale)
    assert fresh.startswith("before\n<!-- generated: topology -->\n\n| name |")
    assert fresh.endswith("\n\n<!-- end of generated -->\nbehind\n")
    assert "old" not in fresh
    assert generate.rewrite(fresh) == fresh


METRICS = page("docs/metrics.md")


def test_no_metric_is_made_up() -> None:
    """Each that the page names, wherever, is one; each family is looked at at night."""
    known = {one.name for one in DEFINITIONS}
    parts = {f"{one.name}_{part}" for one in DEFINITIONS for part in ("bucket", "sum", "count")}
    named = set(re.findall(r"\bjef_[a-z_]+", METRICS))
    assert known <= named
    assert named <= known | parts
    at_night = METRICS[METRICS.index("## At night") :]
    assert re.findall(r"^- \*\*(.*)\.\*\*", at_night, re.MULTILINE) == list(FAMILIES)


def test_the_words_that_the_page_explains_are_labels() -> None:
    """Each `word` of a label that is spoken of at night can be counted."""
    at_night = METRICS[METRICS.index("## At night") :]
    values = {value for one in DEFINITIONS for value in one.values}
    words = {"crashed", "stale-token", "fenced", "finished", "malformed", "no-token", "granted"}
    assert words == {word for word in re.findall(r"`([a-z-]+)`", at_night) if word in values}


def test_series_are_as_many_as_the_page_says() -> None:
    """With all buckets, `+Inf`, sum and count; a label `status` whose values are not fixed has four at most."""

    def series(one: Definition) -> int:
        combinations = len(one.values) or (4 if "status" in one.labels else 1)
        return combinations * (len(one.buckets) + 3 if one.kind == "histogram" else 1)

    of_actions = [one for one in DEFINITIONS if "action" in one.labels]
    each = sum(series(one) for one in of_actions)
    of_histograms = sum(series(one) for one in of_actions if one.kind == "histogram")
    beside = sum(series(one) for one in DEFINITIONS) - each
    told = " ".join(METRICS.split())
    assert f"at most {each} series for each action, {of_histograms} of them of its histograms" in told
    assert beside < 200


# --- configuration ---------------------------------------------------------------------------------------

FILE = ROOT / "config/jef.toml"


def uncommented(folder: Path) -> Path:
    """The file with every key in force: `#` without a space behind it is what comments them out."""
    path = folder / "jef.toml"
    path.write_text(re.sub(r"^#(?! \S|$)", "", page("config/jef.toml"), flags=re.MULTILINE), encoding="utf-8")
    return path


def test_the_file_as_shipped_changes_nothing() -> None:
    assert config.load(FILE, {}, {}) == config.load(Path("/dev/null"), {}, {}) == Settings()


def test_the_file_holds_every_key(tmp_path: Path) -> None:
    """And nothing else: uncommented, it loads, with the defaults where they are fixed."""
    settings = config.load(uncommented(tmp_path), {}, {})
    for name, model in generate.sections():
        shown = getattr(settings, name) if name else settings
        default = getattr(Settings(), name) if name else Settings()
        for key, field, _ in generate.keys_of(model):
            assert key in shown.model_fields_set
            _, is_fixed = generate.shown(key, field)
            assert not is_fixed or getattr(shown, key) == getattr(default, key), key
    documented = {
        key.removeprefix("actions.NAME.") for key in config.known_keys() if key.startswith("actions.")
    }
    assert all(f"# - {key}: " in page("config/jef.toml") for key in documented - {"argv"})


def test_the_files_actions_load(tmp_path: Path) -> None:
    """Each example names an executor, and keys that it takes."""
    settings = config.load(uncommented(tmp_path), {}, {})
    found = specs(settings)
    assert set(found) == set(settings.actions) - {"sign"}
    assert all(load(spec) for spec in found.values())


def test_the_files_ffmpeg_tells_its_percentage(tmp_path: Path) -> None:
    """Its expressions read what ffmpeg writes."""
    spec = specs(config.load(uncommented(tmp_path), {}, {}))["transcode"]
    own = json.loads(spec.settings)
    told: list[tuple[float | None, str | None]] = []
    patterns = Patterns.of(own["progress_pattern"], own["duration_pattern"], own["message_pattern"])
    output = Output(patterns, 0, lambda *words: told.append(words))
    output.feed(b"  Duration: 00:00:20.00, start: 0.000000, bitrate: 1173 kb/s\nframe=125\nfps=0.00\n")
    output.feed(b"out_time_us=5000000\nout_time=00:00:05.000000\nspeed=10x\nprogress=continue\n")
    assert told == [(None, "frame=125"), (25.0, None)]


def test_an_example_of_an_error_is_what_is_said(tmp_path: Path) -> None:
    path = tmp_path / "jef.toml"
    path.write_text("[slots]\ntotl = 8\n")
    with pytest.raises(SettingsError) as caught:
        config.load(path, {}, {})
    assert f"jef: {caught.value}".replace(f"{tmp_path}/", "") in page("docs/configuration.md").splitlines()


# --- life cycle ------------------------------------------------------------------------------------------


def test_each_status_is_explained_once() -> None:
    """In the page's first table."""
    told = re.findall(r"^\| ([A-Z_]+) \|", page("docs/life-cycle.md").partition("```")[0], re.MULTILINE)
    assert told == [status.value for status in Status]


def test_what_is_not_driven_is_said() -> None:
    """The events that the code makes decide; those of jobs that simply run are among them."""
    assert {"Accepted", "Started", "Progressed", "Completed", "Failed", "Interrupted"} <= generate.driven()
    rows = generate.transitions("").splitlines()[2:]
    assert len(rows) == len(TABLE)
    for (place, event), line in zip(TABLE, rows, strict=True):
        possible = place in generate.reached() and event.__name__ in generate.driven()
        assert line.endswith("| yes |" if possible else "| not yet |")


# --- wire protocol ---------------------------------------------------------------------------------------

WIRE = page("docs/wire-protocol.md")
EXAMPLES = re.findall(r"^<!-- example: (\w+) -->\n```json\n(.*?)^```", WIRE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "text"), EXAMPLES)
def test_the_examples_fit_their_schemas(name: str, text: str) -> None:
    """Schema and model take them, and know every key of them."""
    example = json.loads(text)
    assert check(name, example) == []
    assert set(example) <= set(schemas()[name]["properties"])
    assert MODELS[name].model_validate_json(text)


def test_every_message_has_an_example_and_its_fields() -> None:
    """And every block of JSON says what it is an example of."""
    names = {model.__name__ for model in WIRE_MODELS}
    assert {name for name, _ in EXAMPLES} == names
    assert WIRE.count("```json") == len(EXAMPLES)
    assert names <= set(re.findall(r"^<!-- generated: fields (\w+) -->", WIRE, re.MULTILINE))


def test_every_status_that_this_version_tells_has_an_example() -> None:
    told = {json.loads(text)["status"] for name, text in EXAMPLES if name == "StatusNotification"}
    assert {place.value.partition(" ")[0] for place in generate.reached()} <= told | {"(none)"}


def column(heading: str) -> list[str]:
    """The codes in the first column of the table under a heading."""
    table = WIRE.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)


def test_the_reasons_of_dead_letters_are_those_that_the_code_gives() -> None:
    assert sorted(column("reason")) == sorted(given(RequestRefused.__name__, 0, None))


def test_the_types_of_errors_are_those_that_the_code_gives() -> None:
    """Those that `failed` names by their class, and those that are written out."""
    ours = {kind.__name__ for kind in subclasses(ExecutorError)}
    written = given("Failed", None, "error_type")
    assert sorted(column("`error.type`")) == sorted({*ours, *written, RequestRefused.__name__})


def test_operations_answers_and_refusals_of_locks_are_those_that_the_code_knows() -> None:
    operations = schemas()["LockRequest"]["properties"]["operation"]["enum"]
    assert sorted(column("operation")) == sorted(operations)
    assert sorted(column("answer")) == sorted(Answer)
    assert sorted(column("`code`")) == sorted(Refused)
    described = schemas()["LockReply"]["properties"]["status"]["description"]
    assert sorted(re.findall("[A-Z]{4,}", described)) == sorted(Answer)


def test_the_examples_of_locks_are_what_the_service_answers() -> None:
    """The page's requests, in its order, asked of the protocol: the answers are the page's, and there is none more."""
    desk = MemoryLocks()
    for _ in range(16):  # the page begins with the seventeenth grant
        desk.run(Acquire(owner="x", locks=(("asset/42", Mode.SHARED),)), 0)
        desk.run(Release(owner="x"), 0)
    now, answers = 0.0, list[Any]()
    talk = [(name, json.loads(text)) for name, text in EXAMPLES if name in {"LockRequest", "LockReply"}]
    for at, (name, example) in enumerate(talk):
        if name == "LockRequest":
            assert answers == []
            # When it was asked follows from when the lease that it got ends.
            ends = [
                until(each) for _, each in itertools.takewhile(is_reply, talk[at + 1 :]) if starts_lease(each)
            ]
            now = ends[0] - example.get("leaseSeconds", 60) if ends else now
            answers = told(desk.run(wire.decode(json.dumps(example).encode(), 10_000, "here", "1"), now))
        elif example["status"] == "EXPIRED":
            now = until(example)
            answers = told(desk.run(Expire(), now))
        if name == "LockReply":
            answers.remove(example)
    assert answers == []


def is_reply(entry: tuple[str, Any]) -> bool:
    return entry[0] == "LockReply"


def starts_lease(answer: Any) -> bool:
    return answer["status"] in {"GRANTED", "RENEWED", "LOST"}


def until(answer: Any) -> float:
    return datetime.fromisoformat(answer["grants"][0]["leaseUntil"]).timestamp()


def told(replies: Sequence[Reply]) -> list[Any]:
    return [json.loads(wire.encode(reply)) for reply in replies]


def subclasses(kind: type[Exception]) -> list[type[Exception]]:
    found = [inner for inner in kind.__subclasses__() if inner.__module__.startswith("jef_daemon.")]
    return found + [further for inner in found for further in subclasses(inner)]


@functools.cache
def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of the code that refuses or fails something."""
    sources = [path.read_text() for path in (ROOT / "jef_daemon").rglob("*.py")]
    trees = [ast.parse(source) for source in sources if "RequestRefused(" in source or "Failed(" in source]
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def given(function: str, position: int | None, keyword: str | None) -> set[str]:
    """The texts that an argument of a call has anywhere; a variable's are those assigned to it in the function."""
    found: set[str] = set()
    for body in functions():
        for call in ast.walk(body):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == function:
                named = [one.value for one in call.keywords if one.arg == keyword]
                for value in named if position is None else [call.args[position]]:
                    told = texts(value, body)
                    assert told or position is None, f"teach the test to read {ast.unparse(call)}"
                    found |= told
    return found


def texts(value: ast.expr, body: ast.AST) -> set[str]:
    if isinstance(value, ast.Name):
        found: set[str] = set()
        for one in ast.walk(body):
            if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == value.id:
                found |= texts(one.value, body)
        return found
    if isinstance(value, ast.IfExp):
        return texts(value.body, body) | texts(value.orelse, body)
    return {value.value} if isinstance(value, ast.Constant) and isinstance(value.value, str) else set()


def test_headers_are_those_that_the_code_writes() -> None:
    """And those that it reads: a header that only the readers of one side know is a mistake as well."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "jef_daemon").rglob("*.py")]
    written = {name for source in sources for name in re.findall(r'"(x-jef-[a-z-]+)"', source)}
    assert written == set(re.findall(r"^\| `(x-jef-[a-z-]+)` \| [A-Z]", WIRE, re.MULTILINE))


# --- command line ----------------------------------------------------------------------------------------

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])


def lines_of_shell() -> list[str]:
    """Every line that calls `jef` in a block of shell, `jef` and what belongs to it."""
    blocks = [
        block
        for path in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    ]
    return sorted({line for block in blocks for line in block.splitlines() if re.search(r"\bjef ", line)})


@pytest.fixture(scope="module")
def disarmed() -> tuple[Any, list[str]]:
    """The tree of commands, which notes what would be called and calls nothing."""
    tree = generate.command_tree()
    called: list[str] = []

    def disarm(command: Any, name: str) -> None:
        command.callback = lambda **_: called.append(name)
        for inner in getattr(command, "commands", {}).values():
            disarm(inner, inner.name)

    disarm(tree, "jef")
    return tree, called


@pytest.mark.parametrize("line", lines_of_shell())
def test_every_call_of_jef_can_be_typed(line: str, disarmed: tuple[Any, list[str]]) -> None:
    """Commands, options and their types are such that `jef` takes them."""
    tree, called = disarmed
    called.clear()
    words = shlex.split(line, comments=True)
    begin = 1 + next(at for at, word in enumerate(words) if Path(word).name == "jef")
    end = next((at for at, word in enumerate(words) if set(word) <= set("|>&;")), len(words))
    tree.main(words[begin:end], "jef", standalone_mode=False)
    assert len(called) >= 2, line  # the options that all share, then a command


def test_each_exit_code_is_documented_once() -> None:
    codes = {value for name, value in vars(ExitCode).items() if name.isupper()}
    table = page("docs/cli.md").partition("## Exit codes")[2].partition("\n## ")[0]
    assert sorted(map(int, re.findall(r"^\| (\d+) \|", table, re.MULTILINE))) == sorted(codes)
    helped = str(generate.command_tree().epilog).partition("Exit codes")[2]
    assert sorted(map(int, re.findall(r"\b(\d+) [a-z]", helped))) == sorted(codes)


# --- links -----------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        number = sum(1 for known in found if re.fullmatch(rf"{re.escape(slug)}(-\d+)?", known))
        found.add(f"{slug}-{number}" if slug in found else slug)
    return found


def links() -> list[tuple[Path, str]]:
    return [
        (path, link)
        for path in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
        if not link.startswith(("http:", "https:", "mailto:"))
    ]


def test_links_lead_somewhere() -> None:
    """Files and folders of this repository, and headings in them."""
    assert len(links()) > 20
    broken = []
    for path, link in links():
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        is_there = target.is_relative_to(ROOT) and target.exists()
        if not is_there or (anchor and anchor not in anchors(target)):
            broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert broken == []
