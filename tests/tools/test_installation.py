"""Installing: the installer of Detectron2 and detrex, the environment check, the distribution."""

import importlib.metadata
import io
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import _start
import install_detectron2 as installer
import pytest
from detectron2.config import LazyConfig

from projects.stageinteractor.config import environment
from projects.stageinteractor.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# A repository laid out like Detectron2's.
FILES = {
    "README.md": "",
    "setup.py": "raise SystemExit",
    "configs/Base.yaml": "_BASE_: none\n",
    "configs/common/train.py": "train = {}\n",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/layers/csrc/vision.cpp": "",
    "detectron2/tools/kept.py": "",
    "projects/DeepLab/deeplab/__init__.py": "",
    "projects/DeepLab/train_net.py": "",
    "tools/__init__.py": "",
}
# Of what git committed: git ls-tree -r --format='%(objectname) %(path)' HEAD \
#     configs detectron2 projects/DeepLab/deeplab | grep -E '[.](py|yaml)$' | sha256sum
CHECKSUM = "17c8b82ad6de6b5fbf8cf18b7bcd234668d98da133870d60e686f43e3a1c8ad6"
PACKAGE = installer.DETECTRON2._replace(
    repository="owner/detectron2", commit=COMMIT, checksum=CHECKSUM,
)
INSTALLED = {
    "detectron2/__init__.py",
    "detectron2/model_zoo/configs/Base.yaml",
    "detectron2/model_zoo/configs/common/train.py",
    "detectron2/projects/deeplab/__init__.py",
    "detectron2/tools/kept.py",
}
WHEEL = {
    "detectron2/__init__.py": '__version__ = "0.7.2"\n',
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "compiled",
    "tools/__init__.py": "",
    "sal_detectron2-0.7.2.dist-info/METADATA": "Requires-Dist: black\n",
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Where packages are installed, and all that can be found there."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(
        installer, "find_spec", lambda name: PathFinder.find_spec(name, [str(folder)])
    )
    return folder


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A function that writes the archive of a repository where GitHub would offer it."""
    path = tmp_path / f"github/owner/detectron2/archive/{COMMIT}.tar.gz"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(installer, "GITHUB", (tmp_path / "github").as_uri())
    monkeypatch.setattr(installer, "DETECTRON2", PACKAGE)

    def write(files=FILES):
        with tarfile.open(path, "w:gz") as file:
            for name, text in files.items():
                member = tarfile.TarInfo(f"detectron2-{COMMIT}/{name}")
                member.size = len(text)
                file.addfile(member, io.BytesIO(text.encode()))
        return path

    return write


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with a wheel shaped like the real one, of a few bytes."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, text in WHEEL.items():
            file.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


@pytest.fixture
def pip(index, monkeypatch):
    """Replace pip, which takes seconds to start, by a copy of the wheel."""
    def download(command, cure):
        Path(command[command.index("--dest") + 1], index.name).write_bytes(index.read_bytes())

    monkeypatch.setattr(_start, "run", download)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def failed(*arguments):
    """The one line that a failed installation ends with."""
    with pytest.raises(SystemExit) as caught:
        installer.main(arguments)
    line = caught.value.code
    assert line.startswith("error: ") and "\n" not in line
    return line


# ---- the installer


def test_the_python_files_of_the_commit_are_installed(site, archive):
    address = archive().as_uri()
    installer.main([])
    info = "detectron2-0.6.dist-info"
    assert {path for path in files_in(site) if not path.startswith(info)} == INSTALLED
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert (found.name, found.version) == ("detectron2", "0.6")
    assert address in found.read_text("direct_url.json")
    # `pip uninstall` removes what is listed.
    assert {str(path) for path in found.files} == files_in(site)


def test_the_wheel_takes_the_place_of_an_archive_that_is_out_of_reach(site, archive, pip, capsys):
    installer.main([])
    assert COMMIT in capsys.readouterr().out
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert (found.name, found.version) == ("sal-detectron2", "0.7.2")
    assert found.read_text("direct_url.json") is None
    assert {str(path) for path in found.files} == files_in(site)
    assert [str(path) for path in found.files if "dist-info" not in str(path)] == [
        "detectron2/__init__.py"
    ]


CHANGED = FILES | {"detectron2/__init__.py": '__version__ = "0.6"\nimport evil\n'}


@pytest.mark.parametrize("files", [
    CHANGED,
    FILES | {"detectron2/added.py": ""},
    FILES | {"detectron2/../../../evil.py": ""},
    FILES | {"detectron2//../evil.py": ""},
    {name: text for name, text in FILES.items() if name != "configs/Base.yaml"},
], ids=["changed", "added", "outside", "absolute", "missing"])
def test_other_files_than_the_commits_are_refused(site, archive, tmp_path, files):
    address = archive(files).as_uri()
    before = files_in(tmp_path)
    with pytest.raises(UserError):
        installer.read_archive(PACKAGE, address)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2],
    lambda data: data[:99] + bytes(9) + data[108:],
    lambda data: b"<html>",
    lambda data: b"",
], ids=["truncated", "overwritten", "a page", "empty"])
def test_a_damaged_archive_is_refused(archive, damage):
    path = archive()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=path.as_uri()):
        installer.read_archive(PACKAGE, path.as_uri())


def test_a_link_is_not_followed(archive):
    path = archive({})
    with tarfile.open(path, "w:gz") as file:
        for name in FILES:
            member = tarfile.TarInfo(f"detectron2-{COMMIT}/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(member)
    with pytest.raises(UserError):
        installer.read_archive(PACKAGE, path.as_uri())


def test_detrex_has_no_second_source(site, archive, monkeypatch):
    archive()
    assert installer.DETREX.repository in failed("--detrex")
    assert (site / "detectron2").exists() and not (site / "detrex").exists()


def test_detrex_is_installed_on_request(site, archive, monkeypatch):
    archive()
    detrex = PACKAGE._replace(release="detrex==0.3.0", folders={
        source: target.replace("detectron2/", "detrex/", 1)
        for source, target in PACKAGE.folders.items()
    })
    monkeypatch.setattr(installer, "DETREX", detrex)
    installer.main(["--detrex"])
    assert (site / "detrex/model_zoo/configs/Base.yaml").exists()
    assert (site / "detrex-0.3.0.dist-info/RECORD").exists()


@pytest.mark.parametrize("step", range(len(INSTALLED) + 6))
def test_an_interrupted_installation_is_none_or_complete(site, archive, monkeypatch, step):
    archive()
    steps = iter(range(step))

    def interruptible(function):
        def guarded(*arguments, **options):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return function(*arguments, **options)
        return guarded

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", interruptible(Path.write_bytes))
        patch.setattr("os.rename", interruptible(installer.os.rename))
        try:
            installer.main([])
        except SystemExit as error:
            assert error.code == 130
    whole = {path for path in files_in(site) if path.startswith("detectron2/")}
    assert whole in (set(), INSTALLED)

    installer.main([])
    (found,) = importlib.metadata.distributions(path=[str(site)])
    assert {str(path) for path in found.files} == files_in(site) > INSTALLED


def test_what_is_in_the_way_is_named_and_kept(site, archive):
    archive()
    (site / "detectron2").mkdir()
    (site / "detectron2" / "mine.txt").touch()
    assert str(site / "detectron2") in failed()
    assert files_in(site) == {"detectron2/mine.txt"}


def test_site_packages_that_cannot_be_written_are_one_line(site, archive, monkeypatch):
    archive()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(site / "absent"))
    assert str(site / "absent") in failed()


def test_a_wheel_with_a_wrong_checksum_is_refused(site, archive, index):
    assert "DO NOT MATCH THE HASHES" in failed()
    assert files_in(site) == set()


@pytest.mark.parametrize("command", [["/absent/python", "-m", "pip"], ["sleep", "9"]])
def test_a_program_that_is_absent_or_hangs_is_one_line(command):
    with pytest.raises(UserError, match="; the cure$"):
        _start.run(command, "the cure", timeout=0.1)


def test_an_installed_package_is_left_alone(site, capsys):
    (site / "detectron2").mkdir()
    (site / "detectron2" / "__init__.py").write_text("import broken")
    installer.main([])
    assert str(site / "detectron2") in capsys.readouterr().out
    assert files_in(site) == {"detectron2/__init__.py"}


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
    ("detrex", absent("wandb"), "[detrex]"),
    ("projects.stageinteractor", absent("projects"), environment.INSTALL),
])
def test_check_imports(name, error, cure):
    problem = environment.import_problem(name, error)
    assert cure in problem.cure if cure else problem is None


@pytest.mark.parametrize("record, expected", [
    ('{"url": "https://example.org/mine.tar.gz", "archive_info": {}}',
     "mine-tron 1.2, from https://example.org/mine.tar.gz"),
    (None, "mine-tron 1.2, from a package index"),
])
def test_check_where_a_package_came_from(tmp_path, monkeypatch, record, expected):
    info = tmp_path / "mine_tron-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: mine-tron\nVersion: 1.2\n")
    (info / "top_level.txt").write_text("minetron\n")
    if record:
        (info / "direct_url.json").write_text(record)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert environment.origin("minetron") == expected
    assert "pip did not" in environment.origin("absent")


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


def test_the_distribution_is_complete_and_holds_nothing_that_hides_others(tmp_path):
    """What `pip install .` copies: every config can be loaded from it."""
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()",
               "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    files = files_in(tmp_path / "lib")
    assert {path.split("/")[0] for path in files} == {"projects", "configs"}
    assert "projects/__init__.py" not in files
    assert not [path for path in files if path.startswith("configs") and "__init__" in path]
    assert files >= {
        "projects/stageinteractor/py.typed",
        "projects/stageinteractor/analysis/stages/stage_page.html",
    }
    configs = "projects/stageinteractor/configs"
    for path in (ROOT / configs).glob("*.py"):
        assert "model" in LazyConfig.load(str(tmp_path / "lib" / configs / path.name))
