"""The C library as CMake builds it: which instructions are in it, and its own tests, under sanitizers and on ARM. The
wheels it comes in: built, installed where nothing can be compiled, and asked for it."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from project import ROOT

from rebnn_hf.kernels import cpu

CSRC = Path(__file__).parents[1] / "rebnn_hf" / "kernels" / "csrc"


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program}")


def need_compiler():
    named = os.environ.get("CC")
    if not any(map(shutil.which, [shlex.split(named)[0]] if named else ["cc", "gcc", "clang"])):
        pytest.skip("needs a C compiler")


def need_builder():
    if importlib.util.find_spec("scikit_build_core") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip and scikit-build-core (pip install 'rebnn_hf[dev]')")


def run(*command, **environment):
    settings = {**os.environ, **environment}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, f"{shlex.join(done.args)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(folder, target, *options):
    need("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", *generator, "-S", CSRC, "-B", folder, *options)
    run("cmake", "--build", folder, "--target", target)
    return folder / target


def test_the_package_has_its_library():
    need_compiler()
    assert cpu.available(), f"{cpu.why_not()} In a checkout: pip install --no-deps -e ."


@pytest.mark.slow
def test_only_files_for_avx_have_instructions_of_avx(tmp_path):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86-64 processor")
    need_compiler()
    need("objdump")
    build(tmp_path, "objects")
    # AVX and later: names that begin with v, registers ymm, zmm and masks. popcnt came after x86-64, too.
    later = re.compile(r"\t(?:v[a-z]|popcnt).*|.*%(?:[yz]mm\d|k[0-7]).*")
    found = {
        path.name.split(".")[0]: later.findall(run("objdump", "-d", "--no-show-raw-insn", path))
        for path in tmp_path.rglob("*.c.o")
    }
    assert len(found) > 5
    for name in ("isa_avx2", "isa_avx512", "isa_avx512vpopcnt"):
        instructions = found.pop(name)
        assert any("%ymm" in line for line in instructions)
        assert any("%zmm" in line for line in instructions) == (name != "isa_avx2")
    assert not {name: instructions[:3] for name, instructions in found.items() if instructions}


@pytest.mark.slow
def test_the_tests_in_c_are_clean_under_sanitizers(tmp_path):
    need_compiler()
    program = build(tmp_path, "test_rebnn", "-DREBNN_TESTS=ON", "-DREBNN_SANITIZE=ON")
    assert "portable" in run(program)
    assert "2000 rounds" in run(build(tmp_path, "fuzz_rebnn"), 2000, 1)


@pytest.mark.slow
def test_the_tests_in_c_pass_on_arm(tmp_path):
    need("aarch64-linux-gnu-gcc", "qemu-aarch64")
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    compiler = "-DCMAKE_C_COMPILER=aarch64-linux-gnu-gcc"
    program = build(tmp_path, "test_rebnn", "-DREBNN_TESTS=ON", compiler, *system)
    assert "neon" in run("qemu-aarch64", program)


# Wheels


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """What wheels are built from, without anything that was built before."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "rebnn_hf", folder / "rebnn_hf", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def build_wheel(source, folder, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*command, "--wheel-dir", folder, source, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel, folder, backend):
    """Install a wheel in an environment of its own, in which what it depends on can be imported, and ask it."""
    venv.create(folder)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, wheel, **NO_COMPILER)
    return run(python, ROOT / ".ci" / "check_wheel.py", backend, **NO_COMPILER, REBNN_BACKEND="auto")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the wheel for Windows has no library")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wheel_does_what_it_is_tagged_for(source, backend, tmp_path):
    """`cpu`: built with a compiler, used without one. `reference`: built without one too, for any platform."""
    need_builder()
    need_compiler()
    wheel = build_wheel(source, tmp_path, **(NO_COMPILER if backend == "reference" else {}))
    assert wheel.name.endswith("-py3-none-any.whl") == (backend == "reference")
    assert f"runs on backend {backend}" in check_wheel(wheel, tmp_path / "clean", backend)


def test_the_wheel_for_windows_is_for_windows_alone(monkeypatch):
    """A wheel for any platform would keep others from building the library."""
    need_builder()
    from scikit_build_core.settings.skbuild_read_settings import SettingsReader

    def wheel_settings(platform):
        monkeypatch.setattr(sys, "platform", platform)
        return SettingsReader.from_file(ROOT / "pyproject.toml", state="wheel").settings.wheel

    windows, linux = wheel_settings("win32"), wheel_settings("linux")
    assert windows.cmake is False and windows.platlib is True
    assert linux.cmake is True and linux.platlib is not True
