"""Installing: Detectron2's installer, the environment check, the distribution."""

import base64
import csv
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import _start
import install_detectron2 as installer
import pytest
from setuptools.config.setupcfg import read_configuration

from projects.stageinteractor.config import environment
from projects.stageinteractor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
INFO = "sal_detectron2-0.7.2.dist-info"
FILES = {
    "detectron2/__init__.py": '__version__ = "0.7.2"\n',
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
    "detectron2/modeling/_Cautious.py": "",
    "detectron2/tools/kept.py": "",
    "tools/__init__.py": "",
    "tools/train_net.py": "",
    f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
                        "Requires-Dist: numpy<2\nRequires-Dist: black\n"
                        "Requires-Dist: yacs>=0.1.8\n",
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux\n",
    f"{INFO}/top_level.txt": "detectron2\ntools\n",
}


@pytest.fixture
def wheel(tmp_path):
    """A wheel shaped like the real one, of a few bytes."""
    path = tmp_path / "index" / "sal_detectron2-0.7.2-cp310-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
        archive.writestr(f"{INFO}/RECORD", "".join(f"{name},,\n" for name in FILES))
    return path


def pip(*arguments):
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- Detectron2's installer


def test_a_pure_wheel_has_no_tools_and_no_compiled_extension(wheel, tmp_path):
    slim = installer.repack(wheel, tmp_path, pure=True)
    kept = {name for name in FILES if not name.startswith("tools/") and "/_C." not in name}
    with zipfile.ZipFile(slim) as archive:
        assert set(archive.namelist()) == kept | {f"{INFO}/RECORD"}
        assert archive.read(f"{INFO}/top_level.txt") == b"detectron2\n"
        assert b"Tag: py3-none-any\n" in archive.read(f"{INFO}/WHEEL")
        metadata = archive.read(f"{INFO}/METADATA").decode()
    assert [line for line in metadata.splitlines() if "Requires" in line] == [
        "Requires-Dist: yacs>=0.1.8"
    ]


def test_a_built_wheel_keeps_its_compiled_extension_and_its_tag(wheel, tmp_path):
    slim = installer.repack(wheel, tmp_path, pure=False)
    with zipfile.ZipFile(slim) as archive:
        assert "detectron2/_C.cpython-310-x86_64-linux-gnu.so" in archive.namelist()
        assert "tools/__init__.py" not in archive.namelist()
        assert b"Tag: cp310-cp310-linux\n" in archive.read(f"{INFO}/WHEEL")
    assert slim.name == wheel.name


def test_the_record_lists_each_file_with_its_hash_and_size(wheel, tmp_path):
    with zipfile.ZipFile(installer.repack(wheel, tmp_path, pure=True)) as archive:
        rows = list(csv.reader(archive.read(f"{INFO}/RECORD").decode().splitlines()))
        assert [row[0] for row in rows] == archive.namelist()
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()
            assert (digest + "=", size) == (f"sha256={expected}", str(len(data)))
        assert rows[-1][1:] == ["", ""]  # a file cannot hold its own hash


def test_pip_uninstalls_all_that_was_installed(wheel, tmp_path, monkeypatch):
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    site = Path(subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip())
    before = set(site.rglob("*"))
    monkeypatch.setattr(installer, "PIP", [sys.executable, "-m", "pip", "--python", str(python)])

    installer.install(installer.repack(wheel, tmp_path, pure=True))

    assert {path.name for path in site.iterdir()} >= {"detectron2", INFO}
    assert not (site / "tools").exists()
    assert pip("--python", python, "freeze").strip() == "sal-detectron2==0.7.2"
    pip("--python", python, "uninstall", "-y", "sal-detectron2")
    assert set(site.rglob("*")) == before


def failed(*arguments):
    """The one line that a failed installation ends with."""
    with pytest.raises(SystemExit) as caught:
        installer.main(arguments)
    line = caught.value.code
    assert line.startswith("error: ") and "\n" not in line
    return line


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(installer, "find_installed", lambda: None)
    monkeypatch.setattr(installer, "install", lambda wheel: pytest.fail("was installed"))


def test_a_wrong_checksum_is_refused(nothing_installed, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    assert "DO NOT MATCH THE HASHES" in failed()


def test_an_index_out_of_reach_is_one_line_with_the_cure(nothing_installed, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "check the connection" in failed()


def test_a_source_out_of_reach_is_one_line_with_the_cure(
    nothing_installed, tmp_path, monkeypatch
):
    monkeypatch.setattr(installer, "SOURCE", (tmp_path / "absent.git").as_uri())
    assert "leave out --from-source" in failed("--from-source")


@pytest.mark.parametrize("command", [["/absent/python", "-m", "pip"], ["sleep", "9"]])
def test_a_program_that_is_absent_or_hangs_is_one_line(command):
    with pytest.raises(UserError, match="; the cure$"):
        _start.run(command, "the cure", timeout=0.1)


def test_an_installed_detectron2_is_left_alone(tmp_path):
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text('import broken\n__version__ = "9.8"\n')
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "install_detectron2.py"],
        capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)},
    )
    expected = f"Detectron2 9.8 is installed in {tmp_path}/detectron2: left alone\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, "")


# ---- the environment check


@pytest.mark.parametrize("version, fine", [
    ((3, 9, 18), False), ((3, 10, 0), True), ((3, 13, 9), True), ((3, 14, 0), False),
])
def test_check_python(version, fine):
    assert (environment.python_problem(version) is None) == fine


def test_check_requirements():
    versions = {"setuptools": "82.0.1", "torch": "2.11.0+cu128", "scipy": "1.9.3"}
    requirements = ["setuptools<82", "torch>=2.6,<2.16", "scipy>=1.10", "yacs>=0.1", "timm"]
    missing, setuptools, scipy = environment.requirement_problems(requirements, versions.get)
    assert missing.what == "not installed: yacs, timm"
    assert "setuptools 82.0.1" in setuptools.what and "pkg_resources" in setuptools.what
    assert "scipy 1.9.3 is installed, scipy>=1.10 is needed" == scipy.what
    assert {problem.cure for problem in (missing, setuptools, scipy)} == {environment.INSTALL}


def absent(name):
    return ModuleNotFoundError(f"No module named '{name}'", name=name)


@pytest.mark.parametrize("name, error, cure", [
    ("torch", None, None),
    ("torch", absent("torch"), None),  # requirement_problems reports it
    ("torch", OSError("libc10.so: cannot open shared object file"), "uninstall torch, then"),
    ("torchvision", RuntimeError("no operator torchvision::nms"), "uninstall torchvision"),
    ("detectron2", absent("detectron2"), "tools/install_detectron2.py"),
    ("detectron2", absent("yacs"), environment.INSTALL),
    ("detectron2", SyntaxError(), "sal-detectron2, delete"),
    ("projects.stageinteractor", absent("projects"), environment.INSTALL),
])
def test_check_imports(name, error, cure):
    problem = environment.import_problem(name, error)
    assert cure in problem.cure if cure else problem is None


def test_check_a_package_that_shadows_tools(tmp_path):
    assert environment.shadow_problem([tmp_path, tmp_path / "absent"]) is None
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").touch()
    assert str(tmp_path / "tools") in environment.shadow_problem([tmp_path]).cure


def test_check_the_output_folder(tmp_path, monkeypatch):
    assert environment.output_problem(tmp_path / "new" / "output") is None
    (tmp_path / "file").touch()
    assert environment.output_problem(tmp_path / "file")
    assert environment.output_problem(tmp_path / "file" / "output")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert environment.output_problem(tmp_path / "output")


@pytest.mark.parametrize("cuda, mps, device", [
    (True, False, "cuda (Fake)"), (False, True, "mps"), (False, False, "cpu"),
])
def test_check_device(cuda, mps, device):
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: cuda, get_device_name=lambda: "Fake"),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )
    assert environment.describe_device(torch) == device


def test_check_explains_an_environment_with_nothing_in_it(tmp_path):
    command = [sys.executable, "-EsS", ROOT / "tools" / "check.py", "env"]  # no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "not installed: torch, torchvision" in done.stdout
    assert "cure: python tools/install_detectron2.py" in done.stdout


# ---- the distribution


def test_the_distribution_holds_nothing_generic():
    configuration = read_configuration(ROOT / "setup.cfg")["options"]
    packages = configuration["packages"]
    assert "projects.stageinteractor.modeling" in packages
    assert [name for name in packages if name.split(".")[0] != "projects"] == []
