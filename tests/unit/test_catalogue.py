"""Which actions are served, and what is said of those that cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from jef_daemon import ActionExecutor, AsyncActionExecutor, ExecutionContext, action
from jef_daemon.errors import ExecutorNotLoaded, ExitCode
from jef_daemon.run.catalogue import Action, ActionSpec, Catalogue, load, specs
from jef_daemon.run.probe import describe
from jef_daemon.settings import Settings

COMMAND = "jef_daemon.actions.command:Command"


class Plain(ActionExecutor):
    action = "plain"


class Blank(ActionExecutor):
    __doc__ = "\n    "

    def execute(self, context: ExecutionContext[Any]) -> None:
        """Nothing."""


class Nothing(AsyncActionExecutor):
    pass


class Deaf(ActionExecutor):
    def execute(self) -> None:  # type: ignore[override]
        """Nothing."""


class Greedy(ActionExecutor):
    async def execute(self, context: ExecutionContext[Any], more: int) -> None:  # type: ignore[override]
        """Nothing."""


class Yielding(ActionExecutor):
    async def execute(self, context: ExecutionContext[Any]) -> AsyncIterator[int]:
        """Nothing."""
        yield 1


class YieldingBlocking(ActionExecutor):
    def execute(self, context: ExecutionContext[Any]) -> Iterator[int]:
        """Nothing."""
        yield 1


class NoModel(ActionExecutor):
    class Configuration:
        source: str

    def execute(self, context: ExecutionContext[Any]) -> None:
        """Nothing."""


class NoSchema(ActionExecutor):
    class Configuration(BaseModel):
        call: Callable[[], None]

    def execute(self, context: ExecutionContext[Any]) -> None:
        """Nothing."""


class Picky(ActionExecutor):
    class Settings(BaseModel):
        model_config = ConfigDict(extra="forbid")

        level: int


class Fragile(ActionExecutor):
    def __init__(self, settings: BaseModel | None = None) -> None:
        raise RuntimeError("no such device")


@action("greet")
async def greet(context: ExecutionContext[Any]) -> None:
    """A function is an executor too."""


class Outer:
    class Inner(ActionExecutor):
        pass


NUMBER = 5


def configured(actions: dict[str, Any], **more: Any) -> dict[str, ActionSpec]:
    return specs(Settings.model_validate({"actions": actions, "data_dir": "/data", **more}))


def refusal(executor: str, settings: str = "{}") -> str:
    with pytest.raises(ExecutorNotLoaded) as caught:
        load(ActionSpec("nap", executor, settings))
    assert caught.value.exit_code == ExitCode.SETTINGS
    return str(caught.value)


def module(name: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of that text, importable in this test."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


# --- which ones ------------------------------------------------------------------------------------------


def test_installed_ones_are_served_without_configuration() -> None:
    """They may touch the daemon's own folder only."""
    found = configured({})
    assert {"checksum", "copy"} <= set(found)
    assert json.loads(found["copy"].settings) == {"roots": ["/data/files"]}


def test_the_operators_roots_win() -> None:
    found = configured({"copy": {"roots": ["/media"]}})
    assert json.loads(found["copy"].settings) == {"roots": ["/media"]}
    assert found["copy"].executor == configured({})["copy"].executor


def test_roots_that_are_empty_open_nothing() -> None:
    """An empty list is no way to allow everything."""
    assert json.loads(configured({"copy": {"roots": []}})["copy"].settings) == {"roots": ["/data/files"]}


def test_ours_under_another_name_stays_in_the_folder_too() -> None:
    found = configured({"archive": {"executor": "jef_daemon.actions.copy:Copy"}})
    assert json.loads(found["archive"].settings) == {"roots": ["/data/files"]}


def test_disabled() -> None:
    assert "copy" not in configured({"copy": {"enabled": False}})
    assert "nap" not in configured({"nap": {"enabled": False, "command": ["sleep"]}})


def test_a_command() -> None:
    """Its keys go to the executor of commands, with the daemon's grace unless it has its own."""
    found = configured(
        {"nap": {"command": ["sleep", "1"], "environment": {"A": "b"}}}, jobs={"kill_grace_s": 3}
    )
    assert found["nap"].executor == COMMAND
    assert json.loads(found["nap"].settings) == {
        "argv": ["sleep", "1"],
        "environment": {"A": "b"},
        "kill_grace_s": 3,
    }
    own = configured({"nap": {"command": ["sleep"], "kill_grace_s": 1}}, jobs={"kill_grace_s": 3})
    assert json.loads(own["nap"].settings)["kill_grace_s"] == 1


def test_an_executor_of_the_operators() -> None:
    """What the daemon knows stays with the daemon; the rest is the executor's."""
    found = configured({"nap": {"executor": "m:C", "concurrency": 2, "isolation": "process", "level": 5}})
    assert found["nap"] == ActionSpec("nap", "m:C", '{"level": 5}')


def test_another_executor_for_an_installed_name() -> None:
    assert configured({"copy": {"executor": "m:C"}})["copy"] == ActionSpec("copy", "m:C", "{}")


def test_served_are_those_without_a_problem() -> None:
    good, bad = Action(ActionSpec("a", "m:A")), Action(ActionSpec("b", "m:B"), problem="it is broken")
    catalogue = Catalogue({"a": good, "b": bad})
    assert catalogue.served == {"a": good}
    assert set(catalogue.all) == {"a", "b"}


# --- loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Plain", "greet", "Outer.Inner"])
def test_loaded(name: str) -> None:
    """A class, a decorated function, a class in a class; one instance per process."""
    spec = ActionSpec("nap", f"{__name__}:{name}")
    assert isinstance(load(spec), ActionExecutor)
    assert load(spec) is load(ActionSpec("nap", f"{__name__}:{name}"))


def test_its_settings_are_validated() -> None:
    assert load(ActionSpec("nap", f"{__name__}:Picky", '{"level": 5}')).settings.level == 5
    assert "level: " in refusal(f"{__name__}:Picky", '{"level": "x"}')
    assert "level: Field required" in refusal(f"{__name__}:Picky")
    assert "lvl: unknown key; did you mean `level`?" in refusal(f"{__name__}:Picky", '{"level": 1, "lvl": 1}')
    said = refusal(f"{__name__}:Plain", '{"concurency": 1, "zzz": 1}')
    assert "concurency: unknown key; did you mean `concurrency`?" in said
    assert "zzz: unknown key; known are cancellable, command, concurrency, " in said


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("output_tail_bytes", True, "a whole number"),
        ("kill_grace_s", True, "a number"),
        ("success_exit_codes", [0, True], "a whole number"),
    ],
)
def test_true_is_no_number_of_a_command_s(key: str, value: object, wanted: str) -> None:
    said = refusal(COMMAND, json.dumps({"argv": ["true"], key: value}))
    assert said == f"actions.nap: {key}: Input should be {wanted}"


def test_a_command_that_is_wrong_is_told_of_by_the_operators_key() -> None:
    assert refusal(COMMAND, '{"argv": []}').startswith(
        "actions.nap: command: List should have at least 1 item"
    )
    assert refusal(COMMAND, '{"argv": ["{foo}"]}').startswith(
        "actions.nap: command: '{foo}' in '{foo}' is no"
    )


def problem_of(**command: Any) -> str:
    """What is said of an action that runs a program, without the action's name."""
    told: str = describe(ActionSpec("nap", COMMAND, json.dumps(command))).get("problem", "")
    assert told.startswith("actions.nap: ") or not told
    return told.removeprefix("actions.nap: ")


def test_a_program_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its every job would fail; where it would have been looked for is said."""
    monkeypatch.setenv("PATH", "/no/such/folder:/usr/bin:/bin")
    remedy = "install it, or name its full path"
    assert problem_of(argv=["no-such", "{scratch}"]) == (
        f"there is no program no-such in /no/such/folder:/usr/bin:/bin; {remedy}"
    )
    assert problem_of(argv=["/no/such"]) == f"there is no program /no/such; {remedy}"
    assert problem_of(argv=["no-{{such}}"]).startswith("there is no program no-{such} in")
    assert problem_of(argv=["sh"], environment={"PATH": "/no"}) == f"there is no program sh in /no; {remedy}"
    assert problem_of(argv=["./sh"]).startswith("./sh would be looked for in a job's scratch folder, which")
    here = str(tmp_path)
    assert problem_of(argv=["./sh"], working_directory=here).startswith(f"there is no program {here}/./sh;")
    monkeypatch.delenv("PATH")
    assert problem_of(argv=["sh"]) == ""


def test_a_program_that_may_not_be_executed(tmp_path: Path) -> None:
    (tmp_path / "tool").touch(mode=0o644)
    said = f"{tmp_path}/tool may not be executed by the daemon's user; `chmod +x` it, or name another program"
    assert problem_of(argv=[f"{tmp_path}/tool"]) == said
    assert problem_of(argv=["tool"], environment={"PATH": f"/no:{tmp_path}"}) == said
    (tmp_path / "tool").chmod(0o755)
    for argv, more in (
        ([f"{tmp_path}/tool"], {}),
        (["./tool"], {"working_directory": str(tmp_path)}),
        (["tool"], {"environment": {"PATH": f"/no:{tmp_path}"}}),
    ):
        assert problem_of(argv=argv, **more) == ""


@pytest.mark.parametrize(
    "command",
    [
        {"argv": ["{configuration.program}"]},
        {"argv": ["/opt/{configuration.version}/bin/tool"]},
        {"argv": ["tool"], "environment": {"PATH": "/opt/{configuration.version}/bin"}},
    ],
)
def test_a_program_that_depends_on_the_job_is_not_looked_for(command: dict[str, Any]) -> None:
    assert problem_of(**command) == ""


@pytest.mark.parametrize("name", ["#", "*", "video.*", "", "ümlaut", "a\nb", "x" * 129])
def test_a_name_that_no_queue_can_have_or_that_binds_other_actions(name: str) -> None:
    """It makes its own action unserved: declaring it would fail for all of them, without end."""
    with pytest.raises(ExecutorNotLoaded, match="can be no action's name; take 1 to 128 of"):
        load(ActionSpec(name, f"{__name__}:greet"))


@pytest.mark.parametrize("name", ["a", "video.transcode-2", "team/a:b@c+d", "x" * 128])
def test_a_name_that_an_action_can_have(name: str) -> None:
    assert load(ActionSpec(name, f"{__name__}:greet"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Plain", "Plain has no method execute; write it: it does the work"),
        ("Nothing", "Nothing has no method start; write it: it does the work"),
        (
            "Deaf",
            "Deaf.execute cannot be called with the context alone (too many positional arguments); write",
        ),
        (
            "Greedy",
            "Greedy.execute cannot be called with the context alone (missing a required argument: 'more')",
        ),
        ("Yielding", "Yielding.execute yields, so that nothing of it would run; return a response"),
        ("YieldingBlocking", "YieldingBlocking.execute yields, so that"),
        ("NoModel", "NoModel.Configuration is no pydantic model; write class Configuration(BaseModel)"),
        ("NoSchema", "NoSchema.Configuration has no JSON Schema: "),
    ],
)
def test_an_executor_whose_every_job_would_fail(name: str, said: str) -> None:
    assert describe(ActionSpec("nap", f"{__name__}:{name}"))["problem"].startswith(f"actions.nap: {said}")
    assert "problem" not in describe(ActionSpec("nap", f"{__name__}:greet"))


def test_a_docstring_of_nothing_is_none() -> None:
    """`jef actions` then says whose it lacks."""
    assert describe(ActionSpec("nap", f"{__name__}:Blank"))["description"] == ""
    assert describe(ActionSpec("nap", f"{__name__}:greet"))["description"] == "A function is an executor too."


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        ("", 'set executor = "module:Class" or command = [...]'),
        ("module", 'set executor = "module:Class" or command = [...]'),
        (":Class", 'set executor = "module:Class" or command = [...]'),
        ("no_such_module_x:C", "there is no module no_such_module_x"),
        (f"{__name__}:Missing", f"module {__name__} has no Missing"),
        (f"{__name__}:Outer.Missing", f"module {__name__} has no Outer.Missing"),
        (f"{__name__}:NUMBER", "is no ActionExecutor and no function with @action"),
        (f"{__name__}:Outer", "is no ActionExecutor and no function with @action"),
        (f"{__name__}:Fragile", "Fragile() raised RuntimeError: no such device"),
    ],
)
def test_what_cannot_be_loaded(executor: str, said: str) -> None:
    """The action is named, and what is wrong."""
    told = refusal(executor)
    assert told.startswith("actions.nap: ")
    assert said in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_library_x", "there is no module no_such_library_x"),
        ("1 / 0", "importing {} raised ZeroDivisionError: division by zero"),
        ("def", "importing {} raised SyntaxError"),
        ("raise SystemExit(3)", "importing {} raised SystemExit: 3"),
        ("None.x", "importing {} raised AttributeError: 'NoneType' object has no attribute 'x'"),
    ],
)
def test_a_module_that_does_not_import(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The culprit is named: not the module, but what it lacks or raised."""
    name = module(f"broken_{abs(hash(text))}", text, tmp_path, monkeypatch)
    assert said.format(name) in refusal(f"{name}:C")
