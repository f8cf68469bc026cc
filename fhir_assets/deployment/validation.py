"""The validator of a deployment, and the rulesets of its validation and views."""

from fhir_assets.fhir.validation import Validator
from fhir_assets.fhir.views import ViewSet
from fhir_assets.pipeline.load.step import compute_views_ruleset
from fhir_assets.settings import Settings


def build_validator(settings: Settings) -> Validator:
    """Return a validator with the limits and the warning rules of the settings."""
    return Validator(
        warn_rules=settings.validation_warn_rules,
        max_bytes=settings.validation_max_bytes,
        max_depth=settings.validation_max_depth,
        max_values=settings.validation_max_values,
        max_issues=settings.validation_max_issues,
    )


def current_rulesets(settings: Settings, views: ViewSet) -> list[tuple[str, str, str]]:
    """List the rulesets in force: (resource type, stage, ruleset).

    A dead letter whose ``ruleset`` differs from the ruleset of its resource type and stage failed under other rules
    or views; a replay may resolve it.
    """
    rulesets = []
    validation_rules = build_validator(settings).ruleset
    for name in settings.fhir_resource_types:
        view_rules = compute_views_ruleset([view for view in views.views if view.resource_type == name])
        rulesets += [
            (name, "validate", validation_rules),
            (name, "transform", view_rules),
            (name, "load", view_rules),
        ]
    return rulesets
