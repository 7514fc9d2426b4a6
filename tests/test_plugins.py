"""Plug-ins: how modules of others are found and imported, and what is said where they cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
from making import environment

from peft_diffusion.core import plugins
from peft_diffusion.core.errors import UserError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the present directory; modules, path and what was loaded are afterwards as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(plugins, "_loaded", [])
    monkeypatch.setattr(plugins, "_discovered", set())
    return tmp_path


def install(place: Path, name: str, group: str, points: str) -> None:
    """What installing a package with entry points leaves behind."""
    folder = place / f"{name}-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (folder / "entry_points.txt").write_text(f"[{group}]\n{points}\n")


def test_a_module_of_the_present_directory_is_imported_once(place: Path) -> None:
    (place / "counted_plugin.py").write_text("import pathlib\nwith open('count', 'a') as file:\n    file.write('x')\n")
    for _ in range(2):
        plugins.load_plugin("counted_plugin")
    assert plugins.loaded() == ("counted_plugin",)
    assert (place / "count").read_text() == "x"


def test_a_package_is_loaded_by_its_dotted_name(place: Path) -> None:
    (place / "outer_plugin").mkdir()
    (place / "outer_plugin" / "__init__.py").write_text("")
    (place / "outer_plugin" / "inner.py").write_text("value = 3")
    plugins.load_plugin("outer_plugin.inner")
    assert sys.modules["outer_plugin.inner"].value == 3
    assert plugins.source("outer_plugin.inner") == place / "outer_plugin" / "inner.py"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 / 0", "--plugin broken_plugin cannot be imported: ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'; install what it needs"),
        ("from peft_diffusion.core.errors import UserError\nraise UserError('taken')", "cannot be used: taken"),
    ],
)
def test_a_plug_in_that_fails_is_named(place: Path, text: str, words: str) -> None:
    (place / "broken_plugin.py").write_text(text)
    with pytest.raises(UserError) as told:
        plugins.load_plugin("broken_plugin")
    assert "broken_plugin" in str(told.value)
    assert words in str(told.value)
    assert plugins.loaded() == ()


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such_plugin.inner", "json.no_such_plugin"])
def test_a_plug_in_that_is_not_there_is_named(place: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"--plugin {name}: there is no module '\S*no_such_plugin'"):
        plugins.load_plugin(name)
    assert plugins.source(name) is None


@pytest.mark.parametrize("name", ["there.py", "./there.py", "folder/there"])
def test_a_file_in_place_of_a_module_is_told(place: Path, name: str) -> None:
    (place / "there.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UserError, match=r"name the module, not its file: --plugin there, where there\.py lies"):
        plugins.load_plugin(name)


def test_entry_points_are_imported_once_by_group(place: Path) -> None:
    sys.path.append(str(place))
    (place / "installed_plugin.py").write_text("value = 5")
    (place / "other_plugin.py").write_text("1 / 0")
    install(place, "some-package", plugins.METHODS_GROUP, "gain = installed_plugin")
    install(place, "other-package", plugins.LAYOUTS_GROUP, "odd = other_plugin")
    assert [point.name for point in plugins.entry_points(plugins.METHODS_GROUP)] == ["gain"]
    assert "installed_plugin" not in sys.modules
    plugins.discover(plugins.METHODS_GROUP)
    assert sys.modules["installed_plugin"].value == 5
    assert plugins.loaded() == ()
    with pytest.raises(UserError, match="'other_plugin' of the installed package 'other-package' cannot be imported"):
        plugins.discover(plugins.LAYOUTS_GROUP)


def test_the_source_is_found_without_an_import(place: Path) -> None:
    (place / "untouched_package").mkdir()
    (place / "untouched_package" / "__init__.py").write_text("1 / 0")
    (place / "untouched_package" / "part.py").write_text("2 / 0")
    assert plugins.source("untouched_package.part") == place / "untouched_package" / "part.py"
    assert plugins.source("untouched_package") == place / "untouched_package" / "__init__.py"
    assert plugins.source("math") is None
    assert not [name for name in sys.modules if name.startswith("untouched_package")]


def test_the_loader_imports_no_torch() -> None:
    code = "import sys, peft_diffusion.core.plugins; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment()).returncode == 0
