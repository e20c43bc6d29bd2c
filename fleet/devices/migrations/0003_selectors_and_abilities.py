"""A group's selector becomes a text of the language in `devices.selection`; devices say what they can run."""

from django.db import migrations, models


def to_text(apps, schema_editor):
    from fleet.devices import selection

    Group = apps.get_model("devices", "Group")
    for group in Group.objects.all():
        group.selector = str(selection.chosen(group.chosen))
        group.save(update_fields=["selector"])


def to_json(apps, schema_editor):
    """As far as the old form can say it: refuses to guess at the rest."""
    from fleet.devices import selection

    Group = apps.get_model("devices", "Group")
    for group in Group.objects.all():
        selector = selection.parse(group.selector)
        if any(each.negated or not each.values or each.label == selection.NAME for each in selector.requirements):
            raise ValueError(f"group {group.name!r} cannot be said in the old form: {group.selector}")
        group.chosen = {each.label: sorted(each.values) for each in selector.requirements}
        group.save(update_fields=["chosen"])


class Migration(migrations.Migration):
    dependencies = [("devices", "0002_device_refusal")]

    operations = [
        migrations.RenameField("group", "selector", "chosen"),
        migrations.AddField("group", "selector", models.TextField(blank=True, default=""), preserve_default=False),
        migrations.RunPython(to_text, to_json),
        migrations.RemoveField("group", "chosen"),
        migrations.AddField("device", "abilities", models.JSONField(blank=True, default=dict)),
    ]
