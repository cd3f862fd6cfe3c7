"""What is counted in the machine code of the CUDA kernels, and which kernel a function is."""

import json
import os
import subprocess
import sys

import pytest

from instantas.testing import oracle

pytest.importorskip("triton")

STEP = "_ZN9instantas11step_kernelI6__halfLi8ELb1ELb0EEEvNS_4StepIT_EENS_4PlanENS_12CellDivisorsIXT0_EEE"
TEXT = f"""
Fatbin elf code:
================
arch = sm_80

\tcode for sm_80
\t\tFunction : {STEP}
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;   /* 0x00000a00ff017624 */
                                                                            /* 0x000fe200078e00ff */
        /*0010*/                   MUFU.RCP R2, R1 ;                         /* 0x00000a00ff017624 */
        /*0020*/              @!P0 LDG.E R2, [R2.64] ;                       /* 0x0000000402027981 */
        /*0030*/                   F2F.F32.F64 R2, R2 ;                      /* 0x0000000402027981 */
        /*0040*/                   EXIT ;                                    /* 0x000000000000794d */
        /*0050*/                   BRA 0x50;                                 /* 0xfffffff000007947 */
        /*0060*/                   NOP;                                      /* 0x0000000000007918 */
Fatbin elf code:
================
arch = sm_90a

\tcode for sm_90a
\t\tFunction : {STEP}
        /*0000*/                   EXIT ;                                    /* 0x000000000000794d */
"""
PROGRAM = """
import json, sys
from pathlib import Path
from bench import instructions
instructions.CUOBJDUMP = sys.argv[1]
before = instructions.counts(Path(sys.argv[2]))
print(json.dumps([before, instructions.table(before, before), instructions.kernel_and_case(sys.argv[3])]))
"""
ATTENTION = "_ZN9instantas16attention_kernelI13__nv_bfloat16Li64EEEvNS_9AttentionIT_EE"


def test_counts_of_a_listing(tmp_path):
    """In a process of its own, as all that imports Triton's kernels for a compiler."""
    dump, listing = tmp_path / "cuobjdump", tmp_path / "listing"
    dump.write_text('#!/bin/sh\ncat "$2"\n')
    dump.chmod(0o755)
    listing.write_text(TEXT)
    command = [sys.executable, "-c", PROGRAM, dump, listing, ATTENTION]
    environment = os.environ | {"PYTHONPATH": str(oracle.ROOT)}
    done = subprocess.run(command, env=environment, cwd=oracle.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    counts, table, attention = json.loads(done.stdout)
    case = ["step", "fp16 8 a pack guided"]
    assert counts == [[*case, "sm_80", 16, 5, 2, 1, 1], [*case, "sm_90a", 16, 1, 1, 0, 0]]
    assert attention == ["attention", "bf16 D<=64"] and "fp16" not in table
