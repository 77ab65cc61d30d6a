"""The recipes of accelerate, timm, fastai, skorch, ignite, torch_geometric and tensordict, each in its own loop."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.integrations.problems import (
    IGNORED,
    Case,
    Recorder,
    clipped,
    in_bf16,
    mean_and_count,
    recipe,
    reference,
    tagger,
    token_batches,
)

CRITERION = nn.CrossEntropyLoss(ignore_index=IGNORED)


class Rows(nn.Module):
    """The mean over tokens of each example, averaged over examples: what a criterion without a count can be."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        tokens = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
        return (tokens.sum(1) / labels.ne(IGNORED).sum(1)).mean()


def of_rows(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    return Rows()(model(part[0]), part[1])


def equal_shares(count: int) -> list[float]:
    return [1 / count] * count


def expected(loss_of, accumulate: int, rho: float, clip: float | None = None) -> Tensor:
    batches = token_batches(accumulate)
    return clipped(reference(tagger(), loss_of, batches, equal_shares(accumulate), rho), clip)


# accelerate


def accelerate(accumulate: int, clip: float | None, precision: str, rho: float | None) -> list[Tensor]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    model = tagger()
    recorder = Recorder(model.parameters())
    model, optimizer = accelerator.prepare(model, recorder)
    loader = 2 * token_batches(accumulate)
    if rho is not None:
        recipe("Accelerate", rho)["train"](accelerator, model, optimizer, loader, mean_and_count, clip)
        return recorder.gradients
    plain_accelerate(accelerator, model, optimizer, loader, mean_and_count, clip)
    return recorder.gradients


def plain_accelerate(accelerator, model, optimizer, loader, loss_of, clip=None) -> None:
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch)[0])
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


# timm


def timm(accumulate: int, mode: str, rho: float | None) -> list[Tensor]:
    from timm.utils import NativeScaler

    model = images_model()
    recorder = Recorder(model.parameters())
    scaler = NativeScaler(device="cpu")
    scaler._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    clipping = {"clip_grad": 0.01, "clip_mode": mode} if mode else {}
    batches = image_batches(accumulate)
    step = recipe("timm", rho)["train_step"] if rho is not None else plain_timm_step
    for number, (images, targets) in enumerate(2 * batches, start=1):
        last = number % accumulate == 0
        step(model, soft_cross_entropy, images, targets, recorder, scaler, accumulate, last, **clipping)
        if last:
            recorder.zero_grad()
    return recorder.gradients


def plain_timm_step(model, criterion, images, targets, optimizer, scaler, accumulate, need_update, **clipping):
    loss = criterion(model(images), targets) / accumulate
    scaler(loss, optimizer, parameters=model.parameters(), need_update=need_update, **clipping)


def images_model() -> nn.Module:
    import timm as package

    torch.manual_seed(0)
    return package.create_model("test_vit", num_classes=5, img_size=32, patch_size=8)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """As timm's for mixup, whose targets are soft."""
    return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1).mean()


@functools.cache
def image_batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        images = torch.randn(10, 3, 32, 32, generator=generator)
        targets = torch.rand(10, 5, generator=generator).softmax(1)
        batches.append((images, targets))
    return batches


def of_images(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    dtype = next(model.parameters()).dtype
    return soft_cross_entropy(model(part[0].to(dtype)), part[1].to(dtype))


def expected_of_images(accumulate: int, mode: str, rho: float) -> Tensor:
    from timm.utils.agc import adaptive_clip_grad

    model = images_model()
    gradient = reference(model, of_images, image_batches(accumulate), equal_shares(accumulate), rho)
    if mode != "agc":
        return clipped(gradient, 0.01 if mode else None)
    model.double()
    params = list(model.parameters())
    for p, g in zip(params, gradient.split([p.numel() for p in params]), strict=True):
        p.grad = g.view_as(p).clone()
    adaptive_clip_grad(params, 0.01)
    return torch.cat([p.grad.flatten() for p in params])


# fastai


def fastai(accumulate: int, rho: float | None) -> list[Tensor]:
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    batches = 2 * token_batches(accumulate)
    recorders = []

    def optimizer(params, lr):
        recorders.append(Recorder([p for group in params for p in group] if isinstance(params[0], list) else params))
        return OptimWrapper(opt=recorders[0])

    kind = recipe("fastai", rho)["MSAMLearner"] if rho is not None else Learner
    loaders = DataLoaders(Batches(batches), Batches(batches[:1]))
    callbacks = [GradientAccumulation(n_acc=8 * accumulate)] if accumulate > 1 else []
    learner = kind(loaders, tagger(), loss_func=Rows(), opt_func=optimizer, cbs=callbacks)
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, lr=0.0)
    return recorders[0].gradients


class Batches(list):
    """A list of batches, as fastai's loop asks for one."""

    n_inp, bs, device, dataset = 1, 8, None, ()

    def to(self, device):
        return self


# skorch


def skorch(accumulate: int, rho: float | None) -> list[Tensor]:
    from skorch import NeuralNet

    base = recipe("skorch", rho)["MSAMNet"] if rho is not None else NeuralNet

    class Net(base):
        """Accumulation as in skorch's own documentation."""

        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs) / accumulate

        def train_step(self, batch, **fit_params):
            self.seen = getattr(self, "seen", 0) + 1
            step = self.train_step_single(batch, **fit_params)
            if self.seen % accumulate == 0:
                self.optimizer_.step()
                self.optimizer_.zero_grad()
            return step

    net = Net(tagger(), Rows, optimizer=Recorder, lr=0.0, train_split=None, verbose=0).initialize()
    for batch in 2 * token_batches(accumulate):
        net.train_step(batch)
    return net.optimizer_.gradients


# ignite


def ignite(accumulate: int, rho: float | None) -> list[Tensor]:
    from ignite.engine import create_supervised_trainer

    model = tagger()
    recorder = Recorder(model.parameters())
    create = recipe("ignite", rho)["msam_trainer"] if rho is not None else create_supervised_trainer
    create(model, recorder, Rows(), gradient_accumulation_steps=accumulate).run(2 * token_batches(accumulate))
    return recorder.gradients


# torch_geometric


class GraphNet(nn.Module):
    def __init__(self) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        self.first, self.second, self.head = GCNConv(4, 8), GCNConv(8, 8), nn.Linear(8, 3)

    def forward(self, batch):
        from torch_geometric.nn import global_mean_pool

        x = batch.x.to(self.head.weight.dtype)
        x = self.second(self.first(x, batch.edge_index).relu(), batch.edge_index).relu()
        return self.head(global_mean_pool(x, batch.batch))


def graphs(count: int):
    """Batches of 10 graphs of 3 to 9 nodes."""
    from torch_geometric.data import Batch, Data

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        members = []
        for _ in range(10):
            nodes = int(torch.randint(3, 10, (1,), generator=generator))
            edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
            x = torch.randn(nodes, 4, generator=generator)
            members.append(Data(x=x, edge_index=edges, y=torch.randint(0, 3, (1,), generator=generator)))
        batches.append(Batch.from_data_list(members))
    return batches


def graph_net() -> nn.Module:
    torch.manual_seed(0)
    return GraphNet()


def torch_geometric(accumulate: int, rho: float | None) -> list[Tensor]:
    model = graph_net()
    recorder = Recorder(model.parameters())
    for number, batch in enumerate(2 * graphs(accumulate), start=1):
        if rho is None:
            loss = F.cross_entropy(model(batch), batch.y)
        else:
            loss = recipe("torch_geometric", rho)["msam_loss"](model, F.cross_entropy, batch)
        (loss / accumulate).backward()
        if number % accumulate == 0:
            recorder.step()
            recorder.zero_grad()
    return recorder.gradients


def expected_of_graphs(accumulate: int, rho: float) -> Tensor:
    from torch_geometric.data import Batch

    from tests.msam.plain import plain_step

    total = 0.0
    for batch in graphs(accumulate):
        members, model = batch.to_data_list(), graph_net().double()
        parts = [Batch.from_data_list(members[start::4]) for start in range(4)]
        loss_fn = lambda part, model=model: F.cross_entropy(model(part), part.y)  # noqa: E731
        step = plain_step(loss_fn, parts, [part.num_graphs for part in parts], model, rho)
        total = total + torch.cat([g.flatten() for g in step.gradient.values()]) / accumulate
    return total


# tensordict


class Keyed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch):
        return {"logits": self.model(batch["ids"])}


def tensordict(accumulate: int, rho: float | None) -> list[Tensor]:
    from tensordict import TensorDict

    model = Keyed(tagger())
    recorder = Recorder(model.parameters())
    for number, (ids, labels) in enumerate(2 * token_batches(accumulate), start=1):
        batch = TensorDict({"ids": ids, "y": labels}, batch_size=[len(ids)])
        if rho is None:
            loss = Rows()(model(batch)["logits"], batch["y"])
        else:
            loss = recipe("tensordict", rho)["msam_loss"](model, Rows(), batch)
        (loss / accumulate).backward()
        if number % accumulate == 0:
            recorder.step()
            recorder.zero_grad()
    return recorder.gradients


def cases() -> Iterator[Case]:
    """Every recipe with 1 and with 4 accumulated batches."""
    part = functools.partial
    for n in (1, 4):
        times = "accumulation 4" if n == 4 else "plain"
        yield Case(
            "Accelerate", times, ("accelerate",), part(accelerate, n, None, "no"), part(expected, mean_and_count, n)
        )
        for mode in ("", "agc"):
            setting = f"{times}, mixup, {'AGC' if mode else 'scaler'}"
            yield Case("timm", setting, (), part(timm, n, mode), part(expected_of_images, n, mode))
        for name, run in (("fastai", fastai), ("skorch", skorch), ("ignite", ignite), ("tensordict", tensordict)):
            yield Case(name, times, (name,), part(run, n), part(expected, of_rows, n))
        yield Case(
            "torch_geometric", times, ("torch_geometric",), part(torch_geometric, n), part(expected_of_graphs, n)
        )
    clip = 0.01
    yield Case(
        "Accelerate",
        "accumulation 4, clipping",
        ("accelerate",),
        part(accelerate, 4, clip, "no"),
        part(expected, mean_and_count, 4, clip=clip),
    )
    yield Case(
        "Accelerate",
        "bf16",
        ("accelerate",),
        part(accelerate, 1, None, "bf16"),
        part(in_bf16, tagger, mean_and_count, token_batches(1)),
        in_bf16=True,
    )
