"""The contract on a GPU, where one is at hand; elsewhere the interpreter and the compiler stand in for it."""

import pytest
import torch

from dilated_attention_pytorch.backends.triton import TritonBackend, TritonOptions
from dilated_attention_pytorch.testing import CASES, ContractReport
from dilated_attention_pytorch.testing.contract import check_case, check_large_offsets, check_packed

if not torch.cuda.is_available():
    pytest.skip("no CUDA or ROCm device: torch sees none", allow_module_level=True)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PLAIN = [c for c in CASES if not any(word in c.name for word in ("bias", "softcap"))]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", PLAIN, ids=lambda c: c.name)
def test_laws_on_the_device(case, dtype):
    report = ContractReport()
    check_case(TritonBackend(), case, dtype, "cuda", report)
    assert report.checked
    assert not report.refused


@pytest.mark.parametrize("split", ["together", "apart"])
def test_every_split_on_the_device(split):
    report = ContractReport()
    for case in PLAIN:
        if case.name in ("longnet", "longnet_causal", "not_nesting-placed", "documents_of", "sum_with_window"):
            check_case(TritonBackend(TritonOptions(split=split)), case, torch.float32, "cuda", report)
    assert report.checked >= 5


def test_packed_documents_and_large_offsets_on_the_device():
    report = ContractReport()
    check_packed(TritonBackend(), "cuda", report)
    check_large_offsets(TritonBackend(), "cuda", report)
    assert not report.refused
