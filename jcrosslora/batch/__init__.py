"""Many transfers by one plan: every pair aligned once, its adapters shifted together, resumed after any stop."""

from jcrosslora.batch.estimate import estimate_batch as estimate_batch
from jcrosslora.batch.estimate import print_estimates as print_estimates
from jcrosslora.batch.plan_file import BatchPlan as BatchPlan
from jcrosslora.batch.plan_file import Job as Job
from jcrosslora.batch.plan_file import read_plan as read_plan
from jcrosslora.batch.ray_run import run_on_ray as run_on_ray
from jcrosslora.batch.run import run_batch as run_batch
from jcrosslora.batch.summary import Outcome as Outcome
from jcrosslora.batch.summary import Summary as Summary
