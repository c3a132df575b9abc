"""Every method, one file each. Importing this package fills `fader.method.METHODS`."""

from fader.method import METHODS
from fader.methods.aligner import Aligner, AlignerSettings
from fader.methods.cgan import CGan, CGanSettings
from fader.methods.cvae import Cvae, CvaeSettings
from fader.methods.fader import Fader, FaderSettings
from fader.methods.icgan import IcGan, IcGanSettings
from fader.methods.judge import Judge, JudgeSettings
from fader.methods.vacgan import VacGan, VacGanSettings
from fader.methods.vaegan import VaeGan, VaeGanSettings
