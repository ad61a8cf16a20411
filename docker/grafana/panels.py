"""How this project's panels look: Grafana's typed builders, with one set of colours, legends and tooltips.

Every panel has an id that stays, a title, a sentence that says what a value means, and a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    text,
    timeseries,
)
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus as queries
from grafana_foundation_sdk.models.text import TextMode

from docker.grafana.values import GREY, Ask, Column, Steps, Texts

type Panel = Builder[models.Panel]
type Links = Sequence[dashboard.DashboardLink]
# datasources/prometheus.yml gives it this uid.
_SOURCE = models.DataSourceRef(type_val="prometheus", uid="prometheus")
_TAG = "vlafleet"


def link(title: str, url: str) -> dashboard.DashboardLink:
    """Return a link from a panel."""
    made = dashboard.DashboardLink(title).type(models.DashboardLinkType.LINK)
    return made.url(url).target_blank(True)


def only(steps: Steps) -> list[models.DynamicConfigValue]:
    """Return the colours of one value of several, as ``override_by_name`` takes them."""
    return [_property("thresholds", _thresholds(steps).build())]


def board(name: str, title: str, says: str) -> dashboard.Dashboard:
    """Return a dashboard without panels; links above it lead to the others."""
    to_others = dashboard.DashboardLink("vlafleet").type(models.DashboardLinkType.DASHBOARDS)
    return (
        dashboard.Dashboard(title)
        .uid(f"vlafleet-{name}")
        .description(says)
        .tags([_TAG])
        .readonly()
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("5s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(to_others.tags([_TAG]).include_vars(True).keep_time(True))
    )


def row(panel_id: int, title: str) -> dashboard.Row:
    """Return a heading over the panels that follow."""
    return dashboard.Row(title).id(panel_id)


def site_variable() -> dashboard.QueryVariable:
    """Return the choice of a site among those that are registered."""
    return (
        dashboard.QueryVariable("site")
        .label("Site")
        .description("A site that is registered with the SuperLink.")
        .datasource(_SOURCE)
        .query("label_values(vlafleet_site_online, site)")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def number(
    panel_id: int,
    title: str,
    says: str,
    *asked: Ask,
    unit: str = "none",
    width: int = 4,
    height: int = 4,
    decimals: int | None = None,
    steps: Steps = (),
    texts: Texts | None = None,
    shows: shapes.BigValueTextMode = shapes.BigValueTextMode.AUTO,
    links: Links = (),
) -> stat.Panel:
    """Return what is true now, large."""
    panel = _common(stat.Panel(), panel_id, title, says, unit, width, height, links)
    if decimals is not None:
        panel.decimals(decimals)
    return (
        panel.targets(_targets(asked, instant=True))
        .mappings(_mappings(texts or {}))
        .thresholds(_thresholds(steps))
        .color_scheme(_color(steps))
        .no_value("not known")
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .text_mode(shows)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def graph(
    panel_id: int,
    title: str,
    says: str,
    *asked: Ask,
    unit: str = "none",
    width: int = 12,
    height: int = 8,
    steps: Steps = (),
    minimum: float | None = 0,
    maximum: float | None = None,
    stacked: bool = False,
    links: Links = (),
) -> timeseries.Panel:
    """Return curves over time; ``steps`` are lines across them. With ``stacked``, bars upon each other."""
    panel = _common(timeseries.Panel(), panel_id, title, says, unit, width, height, links)
    if minimum is not None:
        panel.min(minimum)
    if maximum is not None:
        panel.max(maximum)
    if steps:
        line = common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED)
        panel.thresholds(_thresholds(steps)).thresholds_style(line)
    if stacked:
        panel.draw_style(shapes.GraphDrawStyle.BARS).fill_opacity(60)
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL))
    by_name = dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC_BY_NAME)
    return (
        panel.targets(_targets(asked))
        .color_scheme(by_name)
        .show_points(shapes.VisibilityMode.NEVER)
        # What a round says holds until the next one.
        .line_interpolation(shapes.LineInterpolation.STEP_AFTER)
        .legend(_legend())
        .tooltip(_tooltip())
    )


def bars(
    panel_id: int,
    title: str,
    says: str,
    *asked: Ask,
    unit: str = "none",
    width: int = 8,
    height: int = 8,
    steps: Steps = (),
    maximum: float | None = None,
    links: Links = (),
) -> bargauge.Panel:
    """Return what is true now, as bars beside each other."""
    panel = _common(bargauge.Panel(), panel_id, title, says, unit, width, height, links)
    if maximum is not None:
        panel.max(maximum)
    return (
        panel.targets(_targets(asked, instant=True))
        .min(0)
        .thresholds(_thresholds(steps))
        .color_scheme(_color(steps))
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def states(
    panel_id: int,
    title: str,
    says: str,
    *asked: Ask,
    texts: Texts,
    width: int = 12,
    height: int = 8,
    links: Links = (),
) -> statetimeline.Panel:
    """Return a band per series, whose colour is its state."""
    panel = _common(statetimeline.Panel(), panel_id, title, says, "none", width, height, links)
    by_step = dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS)
    return (
        panel.targets(_targets(asked))
        .mappings(_mappings(texts))
        .thresholds(_thresholds([(None, GREY)]))
        .color_scheme(by_step)
        .show_value(shapes.VisibilityMode.AUTO)
        .merge_values(True)
        .legend(_legend())
        .tooltip(_tooltip())
    )


def rows(
    panel_id: int,
    title: str,
    says: str,
    keys: Mapping[str, str],
    *columns: Column,
    width: int = 24,
    height: int = 8,
    to_site: bool = False,
    sort_by: str = "",
    links: Links = (),
) -> table.Panel:
    """Return a table with a row for each set of ``keys`` (label: title), and the columns beside them.

    With ``to_site`` the label ``site`` leads to the site's dashboard.
    """
    values = ["Value"] if len(columns) == 1 else [f"Value #{_ref(i)}" for i in range(len(columns))]
    names = {
        **keys,
        **{c.label or value: c.title for c, value in zip(columns, values, strict=True)},
    }
    panel = _common(table.Panel(), panel_id, title, says, "none", width, height, links)
    panel.color_scheme(_color(()))
    panel.targets(_targets([Ask(column.expr) for column in columns], instant=True, as_table=True))
    steps: dict[str, dict[str, Any]] = {
        "filterFieldsByName": {"include": {"pattern": f"/^({'|'.join(names)})$/"}}
    }
    if len(keys) == 1:
        # Unlike a merge it bears a query that finds nothing: a new federation has no losses.
        steps["joinByField"] = {"byField": next(iter(keys)), "mode": "outer"}
    else:
        steps["merge"] = {}
    steps["organize"] = {
        "indexByName": {name: i for i, name in enumerate(names)},
        "renameByName": {name: title for name, title in names.items() if name != title},
    }
    for step, options in steps.items():
        panel.with_transformation(models.DataTransformerConfig(id_val=step, options=options))
    for column in columns:
        panel.override_by_name(column.title, _column_properties(column))
    if to_site:
        to = {"title": "This site", "url": "/d/vlafleet-site?var-site=${__value.raw}"}
        panel.override_by_name(keys["site"], [_property("links", [to])])
    if sort_by:
        panel.sort_by([common.TableSortByFieldState().display_name(sort_by)])
    return panel.no_value("-")


def note(panel_id: int, title: str, content: str, *, width: int, height: int) -> text.Panel:
    """Return Markdown."""
    panel = text.Panel().id(panel_id).title(title).span(width).height(height)
    return panel.mode(TextMode.MARKDOWN).content(content)


def line(
    name: str, *, wide: bool = False, dashed: bool = False, color: str = ""
) -> tuple[str, list[models.DynamicConfigValue]]:
    """Return how the curve of that name is drawn, as ``override_by_name`` takes it."""
    properties = []
    if wide:
        properties.append(_property("custom.lineWidth", 3))
    if dashed:
        style = shapes.LineStyle(fill="dash", dash=[8, 8])
        properties.append(_property("custom.lineStyle", style))
    if color:
        properties.append(_property("color", {"mode": "fixed", "fixedColor": color}))
    return name, properties


def _common[P: (stat.Panel, timeseries.Panel, bargauge.Panel, statetimeline.Panel, table.Panel)](
    panel: P,
    panel_id: int,
    title: str,
    says: str,
    unit: str,
    width: int,
    height: int,
    links: Links,
) -> P:
    panel.id(panel_id).title(title).description(says).datasource(_SOURCE)
    if links:
        panel.links(list(links))
    return panel.unit(unit).span(width).height(height)


def _targets(
    asked: Sequence[Ask], *, instant: bool = False, as_table: bool = False
) -> list[Builder[Any]]:
    made: list[Builder[Any]] = []
    for i, ask in enumerate(asked):
        query = prometheus.Dataquery().ref_id(_ref(i)).datasource(_SOURCE).expr(ask.expr)
        query = query.instant() if instant else query.range()
        if ask.legend:
            query.legend_format(ask.legend)
        if as_table:
            query.format(queries.PromQueryFormat.TABLE)
        made.append(query)
    return made


def _ref(i: int) -> str:
    return chr(ord("A") + i)


def _thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    made = [models.Threshold(value=value, color=color) for value, color in steps]
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        # Without any, Grafana would draw everything from 80 on in red.
        .steps(made or [models.Threshold(color=GREY)])
    )


def _color(steps: Steps) -> dashboard.FieldColor:
    if steps:
        return dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS)
    return dashboard.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color(GREY)


def _mappings(texts: Texts) -> list[models.ValueMapping]:
    options = {
        value: models.ValueMappingResult(text=shown, color=color, index=i)
        for i, (value, (shown, color)) in enumerate(texts.items())
    }
    return [models.ValueMap(options=options)] if options else []


def _column_properties(column: Column) -> list[models.DynamicConfigValue]:
    properties = [_property("unit", column.unit)]
    if column.decimals is not None:
        properties.append(_property("decimals", column.decimals))
    if column.steps:
        properties.append(_property("thresholds", _thresholds(column.steps).build()))
        properties.append(_property("color", {"mode": "thresholds"}))
    if column.texts:
        properties.append(_property("mappings", _mappings(column.texts)))
    if column.steps or column.texts:
        properties.append(_property("custom.cellOptions", shapes.TableColorTextCellOptions()))
    return properties


def _property(name: str, value: object) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val=name, value=value)


def _legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )


def _tooltip() -> common.VizTooltipOptions:
    return (
        common.VizTooltipOptions()
        .mode(shapes.TooltipDisplayMode.MULTI)
        .sort(shapes.SortOrder.DESCENDING)
    )
