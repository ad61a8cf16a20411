"""Holds a dashboard's JSON against Grafana's schema, as the Foundation SDK's models give it.

The models themselves take whatever they are given: unknown fields are dropped, values are not looked at.
"""

import enum
import inspect
import types
from collections.abc import Iterator
from typing import Any, Literal, TypeAliasType, Union, get_args, get_origin, get_type_hints

from grafana_foundation_sdk.cog import plugins, runtime
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import prometheus

plugins.register_default_plugins()


def problems(dashboard: dict[str, Any]) -> list[str]:
    """Return a line for everything in a dashboard that Grafana's schema does not know or does not allow."""
    return list(_check(dashboard, models.Dashboard, "dashboard"))


def _check(value: Any, hint: Any, where: str) -> Iterator[str]:
    if isinstance(hint, TypeAliasType):
        hint = hint.__value__
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return
    if origin in (Union, types.UnionType):
        given = [each for each in arguments if value is None or each is not types.NoneType]
        yield from min((list(_check(value, each, where)) for each in given), key=len)
    elif hasattr(hint, "to_json"):
        yield from _check_object(value, hint, where)
    elif not _fits(value, hint):
        yield f"{where}: {value!r} is no {hint}"
    elif origin is list:
        for i, item in enumerate(value):
            name = item.get("title", i) if isinstance(item, dict) else i
            yield from _check(item, arguments[0], f"{where}[{name}]")
    elif origin is dict:
        for key, item in value.items():
            yield from _check(item, arguments[1], f"{where}.{key}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, or a list or mapping whatever is in it, is of a type."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return value in [member.value for member in hint]
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


def _check_object(value: Any, model: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no {model.__name__}"
        return
    fields = _fields(model)
    if model is models.Panel:
        config = runtime.panelcfg_config(value.get("type", ""))
        if config is None or config.options_from_json_hook is None:
            yield f"{where}: there is no panel of type {value.get('type')!r}"
            return
        fields["targets"] = list[prometheus.Dataquery]
        fields["options"] = _model(config.options_from_json_hook)
        hook = config.field_config_from_json_hook
        custom = _fields(_model(hook)) if hook else {}
        yield from _check_field_config(value.get("fieldConfig", {}), custom, where)
    # Of a mapping, a row or a table's cell the type is fixed, and a plain word in the models.
    if "type" in fields and "type_val" not in inspect.signature(model).parameters:
        kind = model().to_json()["type"]
        if value.get("type") != kind:
            yield f"{where}: the type {value.get('type')!r} is not {kind!r}"
    for key, item in value.items():
        if key not in fields:
            yield f"{where}: {model.__name__} has no {key!r}"
        else:
            yield from _check(item, fields[key], f"{where}.{key}")


def _check_field_config(
    config: dict[str, Any], custom: dict[str, Any], where: str
) -> Iterator[str]:
    own = {f"custom.{key}": hint for key, hint in custom.items()}
    fields = {**_fields(models.FieldConfig), **own}
    for key, item in config.get("defaults", {}).get("custom", {}).items():
        if key not in custom:
            yield f"{where}: its field config has no {key!r}"
        else:
            yield from _check(item, custom[key], f"{where}.custom.{key}")
    for override in config.get("overrides", []):
        for each in override["properties"]:
            if each["id"] not in fields:
                yield f"{where}: an override has no {each['id']!r}"
            else:
                yield from _check(each.get("value"), fields[each["id"]], f"{where}.{each['id']}")


def _fields(model: Any) -> dict[str, Any]:
    """Return what a model's JSON may hold: each key with its type."""
    hints = get_type_hints(model)
    blank = model.__new__(model)
    for attribute in hints:
        setattr(blank, attribute, attribute)
    return {key: hints[attribute] for key, attribute in blank.to_json().items()}


def _model(from_json: Any) -> type:
    """Return the model whose ``from_json`` this is."""
    model: type = from_json.__self__
    return model
