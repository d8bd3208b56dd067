"""Networks, a LightningModule to train them and data to train them on; ordinary modules that know of no Strategy."""

from .alexnet import AlexNet
from .alexnet_small import AlexNetB, AlexNetS
from .classifier import ImageClassifier
from .data_module import ImageDataModule
from .fashion_mnist import FashionMNISTDataModule
from .image_folder import ImageFolderDataModule
from .layers import LocalResponseNorm
from .lenet import LeNet5, LeNet300
from .locally_connected import LocallyConnected2d, LocallyConnectedAutoencoder
from .mnist import MNIST5kDataModule
from .mobilenet import MobileNet
from .photographs import PhotographDataModule
from .textures import TextureDataModule
from .vgg import VGG16, VGGC, VGGD, VGGLike
from .wide_resnet import WideResNet

__all__ = [
    "VGG16",
    "VGGC",
    "VGGD",
    "AlexNet",
    "AlexNetB",
    "AlexNetS",
    "FashionMNISTDataModule",
    "ImageClassifier",
    "ImageDataModule",
    "ImageFolderDataModule",
    "LeNet5",
    "LeNet300",
    "LocalResponseNorm",
    "LocallyConnected2d",
    "LocallyConnectedAutoencoder",
    "MNIST5kDataModule",
    "MobileNet",
    "PhotographDataModule",
    "TextureDataModule",
    "VGGLike",
    "WideResNet",
]
