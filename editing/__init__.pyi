from .adapters import export_adapter as export_adapter
from .adapters import export_lora as export_lora
from .captions import read_captions as read_captions
from .edits import Balance as Balance
from .edits import ConceptEdit as ConceptEdit
from .edits import DestinationPrompt as DestinationPrompt
from .edits import Erasure as Erasure
from .edits import ReferenceImages as ReferenceImages
from .edits import StageOneSettings as StageOneSettings
from .encoders.load import load_encoder as load_encoder
from .errors import EditingError as EditingError
from .families.layout import describe_pipeline as describe_pipeline
from .pictures.comparison import draw_comparison as draw_comparison
from .pictures.draw import draw_pictures as draw_pictures
from .pictures.grid import GridRow as GridRow
from .pictures.grid import draw_grid as draw_grid
from .pipelines import EditablePipeline as EditablePipeline
from .pipelines import check_pipeline as check_pipeline
from .pipelines import load_pipeline as load_pipeline
from .second_moments.estimate import estimate_second_moments as estimate_second_moments
from .second_moments.factors import FactoredMoments as FactoredMoments
from .second_moments.moments import SecondMoments as SecondMoments
from .stage_one.optimize import optimize_values as optimize_values
from .stage_two.update import Update as Update
from .stage_two.update import apply_all_temporarily as apply_all_temporarily
from .stage_two.update import apply_temporarily as apply_temporarily
from .stage_two.update import apply_update as apply_update
from .stage_two.update import compute_update as compute_update
from .uce.projections import ProjectionUpdate as ProjectionUpdate
from .uce.projections import compute_projection_update as compute_projection_update
from .values import EditValue as EditValue
from .weights import export_generator as export_generator
from .weights import export_text_encoder as export_text_encoder
from .weights import load_components_temporarily as load_components_temporarily
from .weights import load_temporarily as load_temporarily

__version__: str
ENGINE_VERSION: str
