"""Models: published sizes, shapes and gradients, weights and their errors, features, counted passes."""

import copy
import os
import pickle
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torchvision import models as tv
from torchvision import transforms as T

from afgstudy import models, networks
from afgstudy.attacks.base import cross_entropy, frozen, input_gradient

OWN = models.names(torchvision_too=False)[:-1]
PAPERS = ["vgg16", "vgg19_bn", "googlenet", "inception_v3", "resnet50", "resnet152", "squeezenet1_0"]


def weights_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(channels: int = 3, size: int = 32, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def imagenet_normalised(x: torch.Tensor) -> torch.Tensor:
    return T.functional.normalize(x, models.IMAGENET_MEAN, models.IMAGENET_STD)


# ---------------------------------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    ("name", "channels", "size", "classes", "count"),
    [
        ("lenet5", 1, 28, 10, 61_706),
        ("madry_mnist", 1, 28, 10, 3_274_634),
        ("resnet9", 3, 32, 10, 4_903_242),
        ("resnet9_dawn", 3, 32, 10, 6_573_120),
        ("resnet32", 3, 32, 10, 464_154),  # He et al. 2016: 0.46M
        ("resnet50_cifar", 3, 32, 10, 542_106),
        ("wrn28_10", 3, 32, 10, 36_479_194),  # Zagoruyko and Komodakis 2016: 36.5M
        ("nin", 3, 32, 10, 966_986),  # Lin et al. 2014
        ("allconv", 3, 32, 10, 1_369_738),  # Springenberg et al. 2015: 1.4M
        ("vgg16", 3, 224, 1000, 138_357_544),
        ("vgg19_bn", 3, 32, 10, 20_040_522),  # sixteen convolutions and one FC 512 -> 10
        ("resnet50", 3, 224, 1000, 25_557_032),
        ("resnet50", 3, 32, 10, 23_520_842),  # the usual CIFAR ResNet-50
        ("resnet152", 3, 224, 1000, 60_192_808),
        ("squeezenet1_0", 3, 224, 1000, 1_248_424),
        ("googlenet", 3, 224, 1000, 6_624_904),
        ("inception_v3", 3, 299, 1000, 23_834_568),  # without the auxiliary head
    ],
)
def test_published_number_of_weights(name, channels, size, classes, count):
    with torch.device("meta"):
        assert weights_of(models.create(name, classes, channels, size)) == count


def test_depth_of_the_cifar_family():
    assert len(models.layers(models.create("resnet32"), (nn.Conv2d, nn.Linear))) == 32
    with torch.device("meta"):
        wide = models.create("wrn28_10")
        assert sum(m.kernel_size == (3, 3) for m in wide.modules() if isinstance(m, nn.Conv2d)) + 3 == 28
        assert {m.p for m in wide.modules() if isinstance(m, nn.Dropout)} == {0.3}
        stages = [len(models.create("resnet50_cifar").network.get_submodule(f"layer{i}")) for i in (1, 2, 3)]
    assert stages == [3, 4, 6]


def test_allconv_averages_six_by_six_class_maps():
    _, found = models.features(models.create("allconv"), ["conv9"])(images())
    assert found["conv9"].shape == (2, 10, 6, 6)  # Springenberg et al. 2015, Table 1


@pytest.mark.parametrize("name", [*OWN, *(n for n in PAPERS if n != "resnet152")])  # resnet50, but longer
def test_logits_and_gradients(name):
    model, x = models.create(name, classes=7, seed=0), images().requires_grad_()
    logits = model(x)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(2)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 1), (96, 3)])
def test_every_size_and_grey_images(size, channels):
    with torch.device("meta"):  # `create` itself checks the form of the logits
        for name in [*OWN, *PAPERS]:
            model = models.create(name, classes=5, channels=channels, size=size)
            first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
            assert first.in_channels == channels


@pytest.mark.parametrize(
    "name",
    "alexnet convnext_tiny densenet121 efficientnet_b0 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small "
    "regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11_bn vit_b_32 "
    "wide_resnet50_2".split(),
)
def test_any_torchvision_network(name):
    device = "cpu" if name.startswith("regnet") else "meta"  # RegNet computes its widths with tensors
    with torch.device(device):
        model = models.create(name, classes=1000, size=224)
    assert weights_of(model) == tv.get_model_weights(name).DEFAULT.meta["num_params"]
    if name != "squeezenet1_1":
        assert models.penultimate(model).out_features == 1000


def test_small_images_keep_resolution():
    "The stem keeps 32 pixels whole and halves 64: the last maps are 4x4 either way."
    for size in (32, 64):
        _, found = models.features(models.create("resnet18", size=size), "layer4")(images(size=size))
        assert found["layer4"].shape == (2, 512, 4, 4)
    for name, layer in (("googlenet", "inception5b"), ("densenet121", "features.norm5")):
        _, found = models.features(models.create(name, size=32), layer)(images())
        assert found[layer].shape[-1] == 4


@pytest.mark.parametrize(("name", "size"), [("squeezenet1_1", 112), ("resnet18", 112)])
def test_large_images_get_torchvisions_own_network(name, size):
    theirs = tv.get_model(name, num_classes=10).eval()
    ours = models.create(name, size=size).eval()
    ours.network.load_state_dict(theirs.state_dict())
    x = images(size=size)
    assert torch.equal(ours(x), theirs(x))


def test_seed_is_reproducible_and_disturbs_nothing():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (models.create("resnet9", width=8, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.network.linear.weight, c.network.linear.weight)
    with pytest.raises(ValueError, match="cannot make"):
        models.create("lenet5", size=4, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    d = models.create("resnet9", width=8)
    assert not torch.equal(before, torch.get_rng_state()) and d.training


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: models.create("resnet-32"), "unknown network 'resnet-32': did you mean resnet32"),
        (lambda: models.create("qqqq"), "there are lenet5, madry_mnist"),
        (lambda: models.create("nin", widht=3), "nin has no option 'widht'"),
        (lambda: models.create("pooled_cnn", widht=3), "did you mean width"),
        (lambda: models.create("resnet18", drop=0.5), "cannot make resnet18 with .*drop=0.5"),
        (lambda: models.create("alexnet", size=32), "cannot make alexnet with .*size=32"),
        (lambda: models.create("lenet5", size=11), "12 pixels or more"),
        (lambda: models.create("lenet5", channels=1, mean=(0.1, 0.2)), "mean has 2 values for 1 channels"),
        (lambda: models.create("lenet5", std=0.0), "std must be positive"),
        (lambda: models.create("resnet32")(images(channels=1)), r"\[B, 3, H, W\], got \(2, 1, 32, 32\)"),
        (lambda: models.create("resnet32")(images()[0]), r"got \(3, 32, 32\)"),
        (lambda: models.create("resnet32")(images().byte()), "floating-point images"),
    ],
)
def test_mistakes_are_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_normalisation_is_inside():
    model = models.create("lenet5", mean=models.IMAGENET_MEAN, std=models.IMAGENET_STD).eval()
    x = images()
    by_hand = T.functional.normalize(x, models.IMAGENET_MEAN, models.IMAGENET_STD)
    torch.testing.assert_close(model(x), model.network(by_hand))
    torch.testing.assert_close(model.double()(x.double()).float(), model.network(by_hand.double()).float())
    grey = models.create("lenet5", channels=1, mean=0.25, std=0.5)
    torch.testing.assert_close(grey.normalise(images(1)), (images(1) - 0.25) * 2)


def test_models_copy_pickle_and_travel_as_state():
    model = models.create("resnet32", mean=0.5, std=0.25, seed=0).eval()
    x = images()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x)) and other.config == model.config
    other = models.create("resnet32").eval()
    other.load_state_dict(model.state_dict())  # the normalisation is part of the state
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["resnet32", "resnet9", "wrn28_10", "pooled_cnn", "nin"])
def test_channels_last_stays_channels_last(name):
    model = models.create(name, seed=0).eval()
    x = images()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    last = next(n for n in reversed(models.layers(model, nn.Conv2d)))
    logits, found = models.features(model, last)(x.to(memory_format=torch.channels_last))
    assert found[last].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_zero_pad_shortcut_is_option_a():
    x = images(16, 8)
    y = networks.ZeroPadShortcut(16, 32, 2)(x)
    assert y.shape == (2, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


# ---------------------------------------------------------------------------------------------- weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", str(tmp_path))
    return tmp_path


def test_saved_weights_make_the_same_model(folder):
    model = models.create("resnet9", 7, 1, 28, mean=0.3, std=0.2, seed=0, width=8)
    model(images(1, 28, 16))  # moves the running statistics
    model = model.eval().to(memory_format=torch.channels_last)
    models.save_weights(model, folder / "net.safetensors", source="a test")
    again = models.create("resnet9", weights="net")
    assert not again.training and again.config == model.config
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    torch.testing.assert_close(again(images(1, 28)), model(images(1, 28)))
    torch.save(model.network.state_dict(), folder / "net.pt")
    by_path = models.create("resnet9", 7, 1, 28, weights=folder / "net.pt", mean=0.3, std=0.2, width=8)
    assert all(map(torch.equal, by_path.state_dict().values(), model.state_dict().values()))
    other = models.create("resnet9", weights="net", mean=0.0, std=1.0)  # what is said wins
    assert other.normalise.mean.item() == 0 and again.normalise.mean.item() == pytest.approx(0.3)
    assert sorted(p.name for p in folder.iterdir()) == ["net.pt", "net.safetensors"]


def test_half_precision_files_are_cast(folder):
    model = models.create("lenet5", channels=1, size=28)
    save_file({k: v.half() for k, v in model.network.state_dict().items()}, folder / "half.safetensors")
    again = models.create("lenet5", channels=1, size=28, weights="half")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.network.fc1.weight, model.network.fc1.weight, rtol=1e-3, atol=1e-4)


def test_a_failed_save_leaves_the_old_file(folder, monkeypatch):
    model = models.create("lenet5", channels=1, size=28)
    path = models.save_weights(model, folder / "net.safetensors")
    before = path.read_bytes()

    def full(state, file, header):
        file.write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(models.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        models.save_weights(model, path)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]
    with pytest.raises(ValueError, match="saved as safetensors"):
        models.save_weights(model, folder / "net.pt")


def test_fine_tuning_gets_a_fresh_head(folder):
    model = models.create("resnet32", seed=0)
    models.save_weights(model, folder / "ten.safetensors")
    tuned = models.create("resnet32", classes=4, weights="ten", seed=1)
    assert tuned.network.linear.weight.shape == (4, 64)
    assert torch.equal(tuned.network.layer3[4].conv2.weight, model.network.layer3[4].conv2.weight)
    with pytest.raises(models.WeightsError, match=r"linear.weight is \(10, 64\) in the file and \(4, 64\)"):
        models.load_weights(tuned, "ten")
    assert models.load_weights(tuned, "ten", with_head=False) is tuned


def test_missing_weights_say_where_and_what(folder, monkeypatch):
    with pytest.raises(models.MissingWeights, match="which holds no weights"):
        models.find_weights("resnet32_cifar10")
    (folder / "resnet32_cifar10.safetensors").touch()
    with pytest.raises(models.MissingWeights, match=r"which holds resnet32_cifar10\.safetensors$") as e:
        models.create("resnet32", weights="resnet32_cifar")
    assert str(folder) in str(e.value) and "AFGSTUDY_WEIGHTS" in str(e.value)
    with pytest.raises(models.MissingWeights, match="there is no folder"):
        models.find_weights(folder / "none" / "net.pt")
    monkeypatch.setenv("AFGSTUDY_WEIGHTS", "")
    with pytest.raises(models.MissingWeights, match="set AFGSTUDY_WEIGHTS"):
        models.find_weights("resnet32_cifar10")
    assert issubclass(models.MissingWeights, FileNotFoundError)


def test_weights_of_another_network_or_shape(folder):
    path = models.save_weights(models.create("lenet5", channels=1, size=28), folder / "net.safetensors")
    with pytest.raises(ValueError, match="belong to 'lenet5', not to 'resnet32'"):
        models.create("resnet32", weights="net")
    state = load_file(path)
    for change, text in (
        (lambda s: s.pop("fc2.bias"), "1 missing: fc2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 not in the network: extra"),
        (lambda s: s.update({"fc2.bias": torch.zeros(3)}), r"fc2.bias is \(3,\) in the file and \(84,\)"),
        (lambda s: s["fc2.bias"].fill_(float("nan")), "NaN or infinite numbers in fc2.bias"),
    ):
        changed = {k: v.clone() for k, v in state.items()}
        change(changed)
        save_file(changed, folder / "changed.safetensors")
        model = models.create("lenet5", channels=1, size=28, seed=0)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(models.WeightsError, match=text):
            models.load_weights(model, "changed")
        assert all(map(torch.equal, before.values(), model.state_dict().values()))  # nothing half loaded


def test_damaged_files(folder):
    model = models.create("lenet5", channels=1, size=28)
    path = models.save_weights(model, folder / "net.safetensors")
    torch.save(model.network.state_dict(), folder / "net.pth")
    for file in ("net.safetensors", "net.pth"):
        whole = (folder / file).read_bytes()
        for part in (whole[: len(whole) // 2], whole[:5], b"", b"<html>404</html>"):
            (folder / file).write_bytes(part)
            with pytest.raises(models.WeightsError, match=f"{file} "):
                models.load_weights(model, folder / file)
    for content in ([1, 2], {"epoch": 3}, {"model": {"a": torch.zeros(1)}}):
        torch.save(content, folder / "other.pt")
        with pytest.raises(models.WeightsError, match="flat dict of tensors"):
            models.load_weights(model, folder / "other.pt")
    assert path.name == "net.safetensors"


class Touch:
    "Unpickling this would create a file."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_with_code_is_refused_and_not_run(folder):
    torch.save({"a": torch.zeros(1), "b": Touch(folder / "executed")}, folder / "evil.pt")
    with pytest.raises(models.WeightsError, match="more than tensors"):
        models.load_weights(models.create("lenet5"), folder / "evil.pt")
    assert not (folder / "executed").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A torch hub whose downloads have happened: files put here are what torchvision loads."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def put(name: str, state: dict) -> None:
        file = tmp_path / "hub" / "checkpoints" / tv.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[1]
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, file)

    return put


def test_default_weights_are_torchvisions(hub):
    theirs = tv.resnet18().eval()
    hub("resnet18", theirs.state_dict())
    ours, x = models.create("resnet18", weights="default"), images(size=224)
    assert ours.config["classes"] == 1000 and ours.config["size"] == 224 and not ours.training
    torch.testing.assert_close(ours(x), theirs(imagenet_normalised(x)))
    tuned = models.create("resnet18", classes=10, weights="default")
    assert tuned(x).shape == (2, 10) and torch.equal(tuned.network.conv1.weight, theirs.conv1.weight)
    with pytest.raises(models.WeightsError, match=r"conv1\.weight is"):
        models.create("resnet18", size=32, weights="default")


def test_a_compiled_model_takes_weights_and_their_normalisation(folder):
    models.save_weights(models.create("lenet5", mean=0.25, std=0.5), folder / "net.safetensors")
    compiled = torch.compile(models.create("lenet5"), backend="eager")
    assert models.load_weights(compiled, "net") is compiled
    assert compiled.normalise.mean.unique().item() == 0.25
    models.save_weights(compiled, folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == (folder / "net.safetensors").read_bytes()


@pytest.mark.parametrize(("name", "aux"), [("googlenet", "aux1"), ("inception_v3", "AuxLogits")])
def test_default_weights_with_auxiliary_heads_and_input_transform(hub, name, aux):
    theirs = tv.get_model(name, aux_logits=True, transform_input=True, init_weights=False)
    for m in theirs.modules():  # statistics under which an untrained network still has logits to compare
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    theirs(imagenet_normalised(images(size=299)))
    theirs.eval()
    hub(name, theirs.state_dict())
    ours, x = models.create(name, weights="default"), images(size=128)
    assert any(k.startswith(aux) for k in theirs.state_dict())
    assert not any(k.startswith(aux) for k in ours.network.state_dict())
    expected = theirs(imagenet_normalised(x))
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)


def test_default_weights_under_densenets_old_names(hub):
    theirs = tv.densenet121().state_dict()
    old = {k.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v for k, v in theirs.items()}
    assert old.keys() != theirs.keys()
    hub("densenet121", old)
    ours = models.create("densenet121", weights="default").network.state_dict()
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_a_failed_download_says_what_to_do(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(models.MissingWeights, match=r"could not download https://.*AFGSTUDY_WEIGHTS"):
        models.create("resnet18", weights="default")
    with pytest.raises(ValueError, match="torchvision has no weights for 'resnet32'"):
        models.create("resnet32", weights="default")


def test_folded_batch_norms_add_their_bias_only():
    network = models.create("inception_v3_trunk", size=96, seed=0).eval().network
    kept = [k for k in network.state_dict() if k.endswith(("conv.weight", "bn.bias"))]
    state = {k: torch.rand_like(network.state_dict()[k]) for k in kept}
    network.load_state_dict(models._unfold(network, state), strict=False)
    block, x = network.Conv2d_2a_3x3, torch.rand(1, 32, 8, 8)
    expected = (block.conv(x) + state["Conv2d_2a_3x3.bn.bias"][:, None, None]).relu()
    torch.testing.assert_close(block(x), expected)


# ---------------------------------------------------------------------------------------------- features


def reference(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    "The first output of every layer, copied the moment it is made."
    kept, handles = {}, []
    for name, module in model.network.named_modules():
        if name:

            def keep(m, args, output, name=name):
                kept.setdefault(name, output.detach().clone())

            handles.append(module.register_forward_hook(keep))
    model(x)
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("name", ["googlenet", "densenet121", "resnet32", "squeezenet1_1"])
@pytest.mark.parametrize("training", [False, True])
def test_features_are_what_the_layers_returned(name, training):
    model, x = models.create(name, seed=0), images(batch=4)
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    model.train(training)
    expected, expected_logits = reference(copy.deepcopy(model), x), copy.deepcopy(model)(x)
    logits, found = models.features(model, list(expected))(x)
    assert torch.equal(logits, expected_logits) and found.keys() == expected.keys()
    for layer in expected:
        assert torch.equal(found[layer], expected[layer]), layer
    assert not any(m._forward_hooks for m in model.modules())


def test_features_keep_gradients_both_ways():
    model = models.create("googlenet", seed=0, dropout=0.0)  # train mode keeps its gradients from vanishing
    wanted = ["conv1.bn", "inception3a.branch2.0.bn", "inception5b"]
    x, y = images(batch=4).requires_grad_(), torch.arange(4)
    (plain,) = torch.autograd.grad(cross_entropy(copy.deepcopy(model)(x), y).sum(), x)
    logits, found = models.features(copy.deepcopy(model), wanted)(x)
    loss = cross_entropy(logits, y).sum()
    of_x, *of_layers = torch.autograd.grad(loss, [x, *found.values()], retain_graph=True)
    assert torch.equal(of_x, plain) and all(g.abs().max() > 0 for g in of_layers)
    (from_layer,) = torch.autograd.grad(found["conv1.bn"].square().sum(), x)
    assert from_layer.abs().max() > 0


def test_features_stop_early_and_leave_the_model_alone():
    model, x = models.create("vgg11", seed=0).eval(), images()
    state = copy.deepcopy(model.state_dict())
    ran = []
    handles = [m.register_forward_pre_hook(lambda m, args: ran.append(m)) for m in model.network.features]
    logits, found = models.features(model, ["features.3", "features.8"], stop=True)(x)
    for handle in handles:
        handle.remove()
    assert logits is None and list(found) == ["features.3", "features.8"]
    assert ran == list(model.network.features[:9])
    whole, all_found = models.features(model, ["features.3", "features.8"])(x)
    assert torch.equal(whole, model(x)) and all(torch.equal(found[k], all_found[k]) for k in found)
    assert all(map(torch.equal, state.values(), model.state_dict().values()))
    assert not model.training and not any(m._forward_hooks for m in model.modules())


def test_features_of_a_layer_that_runs_three_times():
    model, x = models.create("resnet50", seed=0).eval(), images()
    _, found = models.features(model, ["layer1.0.relu", "layer1.0.relu_2", "layer1.0", "layer1.0.bn1"])(x)
    assert torch.equal(found["layer1.0.relu_2"], found["layer1.0"])
    assert torch.equal(found["layer1.0.relu"], found["layer1.0.bn1"].relu())
    with pytest.raises(ValueError, match=r"'layer1\.0\.relu_3' did not run: its module ran 3 times"):
        models.features(model, "layer1.0.relu_3")(x)


class Odd(nn.Module):
    "A module torch.fx cannot trace: its path depends on the data, one layer returns a pair, one is in place."

    def __init__(self):
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.pair = Pair()

    def forward(self, x):
        x = self.act(self.first(x))
        if x.sum() > 1e9:
            x = self.pair(x)[0]
        return self.second(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_features_of_any_module():
    model, x = Odd(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    logits, found = models.features(model, ["first", "act"])(x)
    assert torch.equal(found["first"], model.first(x)) and torch.equal(found["act"], found["first"].relu())
    assert torch.equal(logits, model(x)) and models.layers(model) == ["first", "act", "second", "pair"]
    with pytest.raises(ValueError, match="no layer 'frist' in Odd: did you mean first"):
        models.features(model, "frist")
    with pytest.raises(ValueError, match="'pair' did not run"):
        models.features(model, "pair")(x)
    with pytest.raises(TypeError, match="'0' returns tuple"):
        models.features(nn.Sequential(Pair()), "0")(x)
    with pytest.raises(ValueError, match="no layer ''"):
        models.features(model, "")


def test_features_of_a_compiled_model():
    model, x = models.create("lenet5", channels=1, size=28).eval(), images(1, 28)
    compiled = torch.compile(model, backend="eager")
    assert models.layers(compiled) == models.layers(model)
    assert models.features(compiled, "conv2")(x)[1]["conv2"].shape == (2, 16, 10, 10)
    assert models.penultimate(compiled) is model.network.fc3


def test_penultimate():
    for name in [n for n in [*OWN, *PAPERS] if n not in ("nin", "allconv", "squeezenet1_0")]:
        with torch.device("meta"):
            model = models.create(name, classes=7)
        layer = models.penultimate(model)
        assert isinstance(layer, nn.Linear) and layer.out_features == 7
        assert model.network.get_submodule(models.head(model)[0]) is layer
    for name in ("nin", "allconv", "squeezenet1_0"):
        with pytest.raises(ValueError, match=rf"{name} has no linear layer .* it ends in .* 1x1"):
            models.penultimate(models.create(name))
    with pytest.raises(ValueError, match="neither"):
        models.penultimate(nn.Sequential(nn.ReLU()))


def test_activations_work_out_of_place():
    for name in [*OWN, *PAPERS, "mobilenet_v3_small", "efficientnet_b0"]:
        with torch.device("meta"):
            model = models.create(name)
        assert not any(getattr(m, "inplace", False) for m in model.modules()), name


# ---------------------------------------------------------------------------------------------- passes


@pytest.fixture
def lenet():
    return models.create("lenet5", channels=1, size=28, seed=0).eval()


def test_passes_of_a_gradient_attack(lenet):
    x, y = images(1, 28, 8), torch.arange(8)
    expected, *_ = input_gradient(lenet, x, y, cross_entropy)
    with models.count_passes(lenet) as passes, frozen(lenet):
        gradient, *_ = input_gradient(lenet, x, y, cross_entropy)
        assert (passes.forward_rows, passes.backward_rows) == (8, 8)
        with torch.no_grad():
            lenet(x[:3])
        with torch.inference_mode():
            lenet(x[:2])
    assert torch.equal(gradient, expected)
    assert (passes.forward_rows, passes.backward_rows) == (13, 8)
    input_gradient(lenet, x, y, cross_entropy)  # after the context nothing is counted, and no hook is left
    assert passes.forward_rows == 13 and not lenet._forward_pre_hooks and not lenet._forward_hooks


def test_passes_of_one_gradient_a_class(lenet):
    x = images(1, 28, 4).requires_grad_()
    with models.count_passes(lenet) as passes:
        logits = lenet(x)
        one_by_one = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)[0] for k in range(10)]
        assert (passes.forward_rows, passes.backward_rows) == (4, 40)
        unit = torch.eye(10)[:, None].expand(10, 4, 10)
        (at_once,) = torch.autograd.grad(logits, x, unit, retain_graph=True, is_grads_batched=True)
        assert passes.backward_rows == 80
        torch.func.vmap(lambda v: torch.autograd.grad(logits, x, v, retain_graph=True)[0])(unit)
        assert passes.backward_rows == 120
        torch.autograd.grad(logits.square().sum(), logits, retain_graph=True)  # stays outside the model
        torch.autograd.grad((x - 1).square().sum(), x)
        assert passes.backward_rows == 120
    torch.testing.assert_close(at_once, torch.stack(one_by_one))


def test_passes_of_training(lenet):
    x, y = images(1, 28, 8), torch.arange(8)
    with models.count_passes(lenet) as passes:
        for _ in range(3):
            nn.functional.cross_entropy(lenet(x), y).backward()
        clean, noisy = lenet(x), lenet((x + 0.1).clamp(0, 1))  # logit pairing: two passes, one backward call
        (clean - noisy).square().mean().backward()
    assert (passes.forward_rows, passes.backward_rows) == (40, 40)
    assert all(p.grad is not None for p in lenet.parameters())


def test_passes_that_never_reach_the_logits(lenet):
    x = images(1, 28, 8).requires_grad_()
    with models.count_passes(lenet) as passes, frozen(lenet):
        _, found = models.features(lenet, "relu2", stop=True)(x)
        torch.autograd.grad(found["relu2"].square().sum(), x)
    assert (passes.forward_rows, passes.backward_rows) == (8, 8)


def test_passes_need_a_module_and_may_be_nested(lenet):
    with pytest.raises(TypeError, match=r"needs an .*Module, got function"), models.count_passes(lambda x: x):
        pass
    with models.count_passes(lenet) as outer:
        lenet(images(1, 28, 2))
        with models.count_passes(lenet) as inner:
            lenet(images(1, 28, 3))
    assert (outer.forward_rows, inner.forward_rows) == (5, 3)


# ---------------------------------------------------------------------------------------------- real weights


def quick(model: nn.Module) -> nn.Module:
    "The same model in the memory layout (and, below, with the small batches) that one core likes best."
    return model.to(memory_format=torch.channels_last)


@pytest.mark.real
def test_resnet32_on_cifar10(real_data, real_weights):
    model = quick(models.create("resnet32", weights="resnet32_cifar10"))
    torch.testing.assert_close(model.normalise.mean.flatten(), torch.tensor(models.IMAGENET_MEAN))
    test = torchvision.datasets.CIFAR10(real_data, train=False)
    x, y = torch.from_numpy(test.data).permute(0, 3, 1, 2), torch.tensor(test.targets)
    with torch.inference_mode():
        found = torch.cat([model(part / 255).argmax(1) for part in x.split(100)])
    assert abs((found == y).sum().item() - 9263) <= 10  # about 92.63%, as published


@pytest.mark.real
def test_squeezenet_on_imagenet1000(real_data, real_weights):
    model = quick(models.create("squeezenet1_0", weights="squeezenet1_0_imagenet"))
    assert model.config["classes"] == 1000 and model.config["size"] == 224
    preset = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor()])
    test = torchvision.datasets.ImageFolder(real_data / "imagenet1000", preset)
    assert len(test) == 1000
    first = fifth = 0
    with torch.inference_mode():
        for x, y in torch.utils.data.DataLoader(test, batch_size=5):
            top = model(x).topk(5).indices == y[:, None]
            first, fifth = first + top[:, 0].sum().item(), fifth + top.sum().item()
    assert abs(first - 593) <= 3 and abs(fifth - 821) <= 3  # about 59.3% top-1, 82.1% top-5


@pytest.mark.real
def test_inception_trunk_sees_imagenette(real_data, real_weights):
    "Five training images a class are enough for a linear probe on pooled features (30 give 95.5%)."
    model = quick(models.create("inception_v3_trunk", weights="inception_v3_trunk"))
    assert model.normalise.mean.flatten().tolist() == [0.5] * 3 and model.config["size"] == 299
    pooled = models.features(model, ["Mixed_7a", "flatten"], stop=True)

    def probe(split: str, each: int):
        images = torchvision.datasets.ImageFolder(
            real_data / "imagenette2" / split, T.Compose([T.Resize((299, 299)), T.ToTensor()])
        )
        first = [i for c in range(10) for i in [i for i, t in enumerate(images.targets) if t == c][:each]]
        chosen = torch.utils.data.Subset(images, first)
        found = []
        with torch.inference_mode():
            for x, _ in torch.utils.data.DataLoader(chosen, batch_size=5):
                found.append(pooled(x)[1])
        assert found[0]["Mixed_7a"].shape == (5, 1280, 8, 8)
        return torch.cat([f["flatten"] for f in found]), torch.arange(10).repeat_interleave(each)

    (train, labels), (test, truth) = probe("train", 5), probe("val", 3)
    accuracy = LogisticRegression(C=10, max_iter=1000).fit(train, labels).score(test, truth)
    assert accuracy >= 0.85
