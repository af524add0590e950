"""Proves that object files keep to their instruction set: NAME_avx2.cpp.o to AVX2, one of no set to x86-64's baseline.

    python scripts/ci/check_instruction_sets.py build/tests/csrc/CMakeFiles/lockstep_kernels.dir/*.o

A file that is compiled with the flags of a newer processor, or an inline function that came out of one, ends the whole
program on an older processor, long before any dispatch or right after it.

Exits 0 when all are clean, 1 when one is not, 2 when objdump is missing, cannot read a file, finds no x86-64 code in
it, or no file is given.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator

CLEAN, FOUND, UNUSABLE = 0, 1, 2
SHOWN = 3
X86_64 = re.compile(r"file format (elf64|mach-o|pe)-x86-64")
INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\s+(\S.*)$", re.MULTILINE)
FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_AVX = r"%[yz]mm\d|%k[0-7]\b|^vzero|^v\w+\s.*%xmm\d"
"""Wide registers, masks, and the AVX forms of old instructions, which touch only 128 bits and are AVX all the same."""
_AVX512 = r"%zmm\d|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b|^vpdp"
"""Its registers and masks, and integer products without the mark of AVX-VNNI."""
_AVX_VNNI = r"^\{vex\} vpdp"
_BF16 = r"^vdpbf16|^vcvtne2?ps2bf16"
_TILES = r"%tmm\d|^(ld|st)tilecfg|^tilerelease"

BEYOND = {
    "amx": (_AVX_VNNI,),
    "avx512_bf16": (_AVX_VNNI, _TILES),
    "avx512": (_AVX_VNNI, _BF16, _TILES),
    "avx_vnni": (_AVX512, _BF16, _TILES),
    "avx2": (_AVX512, _AVX_VNNI, _BF16, _TILES),
    "the baseline": (_AVX, _AVX_VNNI, _TILES),
}
"""Of each instruction set: what its objects must not hold."""


class Unusable(Exception):
    """The check cannot be made; the text says why."""


def instruction_set(path: str) -> str:
    """The set that an object is compiled for: what its name ends with."""
    stem = path.removesuffix(".o").removesuffix(".cpp")
    return next((name for name in BEYOND if stem.endswith(f"_{name}")), "the baseline")


def violations(listing: str, name: str) -> Iterator[str]:
    """ "FUNCTION: INSTRUCTION" for each instruction of a disassembly that the instruction set does not have."""
    beyond = re.compile("|".join(BEYOND[name]))
    function = "?"
    for line in listing.splitlines():
        heading = FUNCTION.match(line)
        if heading:
            function = heading[1]
            continue
        instruction = INSTRUCTION.match(line)
        if instruction and beyond.search(instruction[1]):
            yield f"{function}: {' '.join(instruction[1].split())}"


def disassemble(objdump: str, path: str) -> str:
    """The listing of one object file. Raises Unusable when it holds no code that could be judged."""
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise Unusable(f"{objdump} does not start ({error.strerror}); install binutils") from error
    if done.returncode:
        raise Unusable(f"{path}: {done.stderr.strip() or 'objdump cannot read it'}")
    if not X86_64.search(done.stdout):
        raise Unusable(f"{path} holds no x86-64 code, so there is nothing to prove")
    if not INSTRUCTION.search(done.stdout):
        raise Unusable(f"{path} holds no instruction at all")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", nargs="*", metavar="OBJECT")
    parser.add_argument("--objdump", default="objdump", metavar="PROGRAM")
    given = parser.parse_args()
    if not given.objects:
        print("no object file was given", file=sys.stderr)
        return UNUSABLE
    outcome = CLEAN
    for path in given.objects:
        try:
            name = instruction_set(path)
            found = list(violations(disassemble(given.objdump, path), name))
        except Unusable as error:
            print(error, file=sys.stderr)
            return UNUSABLE
        if found:
            outcome = FOUND
            print(f"{path}: {len(found)} instructions beyond {name}")
            print("\n".join(f"  {text}" for text in found[:SHOWN]))
    if outcome == CLEAN:
        print(f"{len(given.objects)} object files keep to their instruction sets")
    return outcome


if __name__ == "__main__":
    sys.exit(main())
