"""The C library as CMake builds it: which instructions are in it, and its own tests, under sanitizers and on ARM."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

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


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
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
