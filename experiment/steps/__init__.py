"""The steps of an experiment by subject; each makes cached stages."""

from experiment.display import Display
from experiment.settings import ExperimentConfig
from experiment.steps.context import StepContext
from experiment.steps.features import FeatureSteps
from experiment.steps.heads import HeadSteps
from experiment.steps.proxies import ProxySteps
from experiment.steps.students import StudentSteps
from experiment.steps.texts import TextSteps
from experiment.steps.traces import TraceSteps


class Steps:
    """All steps of one experiment; they share one context."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.traces = TraceSteps(context)
        self.texts = TextSteps(context)
        self.features = FeatureSteps(context)
        self.heads = HeadSteps(context)
        self.proxies = ProxySteps(context)
        self.students = StudentSteps(context)

    @classmethod
    def of(cls, config: ExperimentConfig, display: Display) -> "Steps":
        """The steps of a new run."""
        return cls(StepContext(config, display))

    @property
    def config(self) -> ExperimentConfig:
        return self.context.config
