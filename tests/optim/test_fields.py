"""Every field of every optimizer changes what an update does."""

from tests import packed
from tests.fields import FieldTest
from tests.optim.test_updates import CASES
from tests.probes import update

# Second values that the probe's two parameters can feel: a matrix of 4 by 8, and a bias.
VALUES = {
  "AdEMAMix.b3": (0.9,),
  "SOAP.largest": (4,),
  "SOAP.spared": ("matrix",),
  "Muon.spared": ("matrix",),
}
EXEMPT = {"ScheduleFreeAdamW.average": "it is an average itself, and refuses another"}
ONE_VALUE = "Adafactor.moments"  # It keeps none, and refuses a narrower kind.


def test_every_field_of_every_optimizer_changes_the_update():
  optimizers = [optimizer for optimizer, *_ in CASES.values()]
  rates = {f"{type(o).__name__}.rates": ((("matrix", 0.5),),) for o in optimizers}
  looks = FieldTest({"update": update}, VALUES | rates, EXEMPT)
  for optimizer in optimizers:
    assert looks.dead(packed.experiment(optimizer=optimizer), under="optimizer.") == []
  untried = [line for line in looks.untried.values() if f"({ONE_VALUE})" not in line]
  assert not untried, "\n".join(untried)
