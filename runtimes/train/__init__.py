"""Training: one loop for every system, on one process or many, that goes on after any kill as if nothing had been."""

from runtimes.train.loop import train as train
from runtimes.train.progress import Progress as Progress
from runtimes.train.progress import Silent as Silent
from runtimes.train.report import TrainReport as TrainReport
