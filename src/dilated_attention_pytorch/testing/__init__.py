"""The contract that every backend must pass, the odd problems it is tried on, and wrong backends that must fail it.

A backend of your own is held to it in three lines::

    from dilated_attention_pytorch.testing import check_contract
    report = check_contract(MyBackend(), device="cuda")
    print(report)
"""

from dilated_attention_pytorch.testing.cases import CASES, PATTERNS, Case
from dilated_attention_pytorch.testing.contract import ContractReport, ContractViolation, check_contract
from dilated_attention_pytorch.testing.mutants import MUTANTS

__all__ = ["CASES", "MUTANTS", "PATTERNS", "Case", "ContractReport", "ContractViolation", "check_contract"]
