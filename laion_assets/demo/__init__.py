"""The built-in demo: a small index of clip art in LAION's layout, a model, and seed sets of images."""

from laion_assets.demo.build import DEMO_MODEL, DEMO_SETS, DemoReport, build_demo, is_demo

__all__ = ["DEMO_MODEL", "DEMO_SETS", "DemoReport", "build_demo", "is_demo"]
