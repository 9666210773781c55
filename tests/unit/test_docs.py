"""The documentation tells what the code does: what can be held against the code is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from docs import generate
from jef_daemon import config
from jef_daemon.actions.output import Output, Patterns
from jef_daemon.errors import SettingsError
from jef_daemon.run.catalogue import load, specs
from jef_daemon.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# --- what is generated -----------------------------------------------------------------------------------


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
    examples = {
        "amqp_url_file",
        "amqp_password_file",
        "data_dir",
        "blocking_processes",
        "execution_timeout_s",
    }
    for name, model in generate.sections():
        shown = settings if not name else getattr(settings, name)
        default = Settings() if not name else getattr(Settings(), name)
        for key, _, _ in generate.keys_of(model):
            assert key in shown.model_fields_set
            assert key in examples or getattr(shown, key) == getattr(default, key), key
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
