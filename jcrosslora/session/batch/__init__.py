"""Run many transfers from one plan: align every pair once, shift its adapters together, resume after any stop."""

from jcrosslora.session.batch.outcomes import Outcome as Outcome
from jcrosslora.session.batch.outcomes import Summary as Summary
from jcrosslora.session.batch.plan import BatchPlan as BatchPlan
from jcrosslora.session.batch.plan import Job as Job
from jcrosslora.session.batch.plan import estimate_batch as estimate_batch
from jcrosslora.session.batch.plan import print_estimates as print_estimates
from jcrosslora.session.batch.plan import read_plan as read_plan
from jcrosslora.session.batch.ray_run import run_on_ray as run_on_ray
from jcrosslora.session.batch.run import run_batch as run_batch
