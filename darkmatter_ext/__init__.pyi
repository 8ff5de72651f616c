"""What `import darkmatter_ext as dm` gives: the one list of public names. `__init__.py` reads it to know where each lives."""

from typing import Any

from darkmatter_ext.estimators.least_squares import LinearFit as LinearFit
from darkmatter_ext.estimators.least_squares import fit_linear as fit_linear
from darkmatter_ext.measurement.decompose import Decomposition as Decomposition
from darkmatter_ext.measurement.decompose import decompose as decompose
from darkmatter_ext.measurement.run import Measurement as Measurement
from darkmatter_ext.notebook import measure as measure
from darkmatter_ext.notebook import page as page
from darkmatter_ext.notebook import run as run
from darkmatter_ext.ops.acts import SparseActs as SparseActs
from darkmatter_ext.ops.build_info import build_info as build_info
from darkmatter_ext.ops.decode import find_support as find_support
from darkmatter_ext.ops.decode import sparse_decode as sparse_decode
from darkmatter_ext.ops.encode import PreparedEncoder as PreparedEncoder
from darkmatter_ext.ops.encode import prepare_encoder as prepare_encoder
from darkmatter_ext.ops.encode import threshold_encode as threshold_encode
from darkmatter_ext.ops.encode import topk_encode as topk_encode
from darkmatter_ext.ops.pursuit import prepare_dictionary as prepare_dictionary
from darkmatter_ext.ops.pursuit import pursuit as pursuit
from darkmatter_ext.ops.pursuit import refit as refit
from darkmatter_ext.ops.pursuit_choice import PreparedDictionary as PreparedDictionary
from darkmatter_ext.report.result import Result as Result
from darkmatter_ext.report.result import load_result as load_result
from darkmatter_ext.runtime.inputs import InputError as InputError
from darkmatter_ext.saes.drop_in import Stats as Stats
from darkmatter_ext.saes.drop_in import accelerate as accelerate
from darkmatter_ext.saes.drop_in import deaccelerate as deaccelerate
from darkmatter_ext.saes.drop_in import is_accelerated as is_accelerated
from darkmatter_ext.saes.drop_in import refresh as refresh
from darkmatter_ext.saes.drop_in import stats as stats
from darkmatter_ext.saes.loading import load_sae as load_sae
from darkmatter_ext.training.config import StreamConfig as StreamConfig
from darkmatter_ext.training.config import TrainingConfig as TrainingConfig
from darkmatter_ext.training.saving import TrainedSae as TrainedSae
from darkmatter_ext.training.train import train as train

_C: Any  # the compiled module: constants of the C++ side
