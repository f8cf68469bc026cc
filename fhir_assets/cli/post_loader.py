"""`fhir-assets post-loader`: load what is posted over HTTP within seconds."""

import signal

from fhir_assets import logs
from fhir_assets.deployment.views import build_views
from fhir_assets.deployment.warehouse import Warehouse
from fhir_assets.orchestration.instance import config
from fhir_assets.orchestration.posts.loader import PostLoader
from fhir_assets.orchestration.posts.loads import PostLoads
from fhir_assets.orchestration.posts.reports import PostReports
from fhir_assets.settings import load_settings


def post_loader() -> None:
    """Load posts to the HTTP API within seconds, until SIGTERM or Ctrl-C; a load in progress is completed first.

    Without a post loader, the sensors of Dagster request runs for posts. Several post loaders can run at the same time:
    one works, and the others stand by. While the database cannot be reached, the command waits for it.
    """
    settings = load_settings()
    logs.configure("post-loader", settings.log_level)
    warehouse = Warehouse(settings)
    views = build_views(settings).views
    loads = PostLoads(settings, warehouse, views)
    loader = PostLoader(
        warehouse, loads, PostReports(settings, warehouse, views, lambda: config.open_instance(settings))
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loader.stop())
    loader.run()
