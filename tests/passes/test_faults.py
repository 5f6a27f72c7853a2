import pytest

from passes.runner import ContractBroken, recipe_name
from tests.passes.faults import FAULTS, MISSES
from tests.passes.sabotage import LINE, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_caught_at_its_pass_and_its_site(fault: Fault) -> None:
    with pytest.raises(ContractBroken) as caught:
        fault.run()
    assert caught.value.site == fault.site
    assert caught.value.line == LINE
    assert caught.value.what.startswith(f"{recipe_name(type(fault.step))} broke its contract, ")


@pytest.mark.parametrize(("fault", "why"), MISSES, ids=[fault.name for fault, _ in MISSES])
def test_what_no_contract_sees_is_known_with_its_reason(fault: Fault, why: str) -> None:
    fault.run()
    assert why


def test_of_thirty_faults_twenty_nine_are_caught() -> None:
    assert len(FAULTS) >= 30
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len(MISSES) / (len(FAULTS) + len(MISSES)) < 0.06
