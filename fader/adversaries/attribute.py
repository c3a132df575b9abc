"""A classifier of real images says whether a swap shows the attributes that were asked for."""

from dataclasses import dataclass

from fader.adversaries.adversary import Adversary, AdversarySettings, View
from fader.losses.attributes import attribute_loss
from fader.method import Batch, Context, Loss, Networks
from fader.networks.classifier import Classifier
from fader.settings import setting


@dataclass(frozen=True)
class ClassifierSettings(AdversarySettings):
    hidden_channels: int = setting(512, "of the classifier's last hidden layer", least=1)


class AttributeAdversary(Adversary):
    """Reads the attributes of swaps, as it has learnt to from real images.
    The classifier sees real images only, so a decoder can learn to draw what this one network reads and no person sees.
    Source: the option `lambda_clf_dis` of facebookresearch/FaderNetworks."""

    name, network = "classifier", "classifier"
    settings: ClassifierSettings

    def build(self) -> Classifier:
        layout, width = self.autoencoder.layout, self.attributes.logits_width(self.head)
        sizes = (layout.channels, layout.init_channels, layout.max_channels, self.settings.hidden_channels)
        return Classifier(layout.image_size, width, *sizes, norm=self.autoencoder.norm)

    def discriminator_loss(self, networks: Networks, batch: Batch, context: Context) -> Loss:
        return self.recognition(networks["classifier"](batch.images), batch)

    def pressure(self, networks: Networks, view: View, batch: Batch, context: Context) -> Loss:
        """The swap should be read as the attributes that it was decoded with."""
        swap, everyone = view.swap(), batch.size.expand_as(batch.known)
        verdict = attribute_loss(self.attributes, networks["classifier"](swap.images), swap.labels, everyone, self.head)
        return Loss(context.weights["classifier"] * verdict, {"classifier": verdict.detach()})
