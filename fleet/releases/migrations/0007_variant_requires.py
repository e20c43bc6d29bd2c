"""The floors of a variant stand beside its manifest, so that the policy reads no manifests."""

from django.db import migrations, models


def from_manifests(apps, schema_editor):
    from device_sdk.protocol.errors import ProtocolError
    from device_sdk.protocol.manifest import Manifest

    Variant = apps.get_model("releases", "Variant")
    for variant in Variant.objects.only("manifest").iterator():
        try:
            requires = Manifest.parse(variant.manifest.encode()).requires
        except ProtocolError:
            continue  # never valid, so never assigned
        Variant.objects.filter(pk=variant.pk).update(requires=requires.to_json())


class Migration(migrations.Migration):
    dependencies = [("releases", "0006_acceptance")]

    operations = [
        migrations.AddField("variant", "requires", models.JSONField(blank=True, default=dict)),
        migrations.RunPython(from_manifests, migrations.RunPython.noop),
    ]
