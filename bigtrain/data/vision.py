"""Images with classes: decoded, brought to one size, augmented, normalised."""

from bigtrain.config import config
from bigtrain.data.augment import Augmentation
from bigtrain.data.examples import Source
from bigtrain.experiment import DataConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@config
class ImageData(DataConfig):
  """`inputs` is float32 (B, size, size, channels)."""

  source: Source
  size: int  # Pixels of height and width of what the model sees.
  channels: int = 3  # 1 grey, 3 colours; images of the other kind are converted.
  crop: float = 1.0  # Side of the centre crop, as a share of the shorter side; 0.875 is 224 of 256.
  augment: tuple[Augmentation, ...] = ()  # Of training images alone, in this order.
  mean: tuple[float, ...] = (0.5,)  # Of pixels from 0 to 1: one number, or one for each channel.
  std: tuple[float, ...] = (0.5,)
