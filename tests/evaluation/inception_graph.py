"""The network of TensorFlow's graph file, layer by layer, as NVIDIA's and OpenAI's files name its weights; written from
the graph, not from ours."""

import torch
import torch.nn.functional as F


class Graph:
    """Makes random weights as it goes: `tensors` after the first run are what a file would hold."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors, self.seen = {}, {}

    def conv(self, name, x, cout, kernel, stride=1, padding=0):
        name, shape = f"layers.{name}", (cout, x.shape[1], *kernel)
        fan = x.shape[1] * kernel[0] * kernel[1]
        made = {
            "weight": torch.randn(shape, generator=self.generator) * (2 / fan) ** 0.5,
            "beta": torch.randn(cout, generator=self.generator) * 0.1,
            "mean": torch.randn(cout, generator=self.generator) * 0.1,
            "var": torch.rand(cout, generator=self.generator) + 0.5,
        }
        weight, beta, mean, var = (self.tensors.setdefault(f"{name}.{field}", value) for field, value in made.items())
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        self.seen[name] = F.relu(F.batch_norm(x, mean, var, None, beta, eps=1e-3))
        return self.seen[name]

    def tower(self, name, x, *layers):
        for i, layer in enumerate(layers):
            x = self.conv(f"{name}.conv" + (f"_{i}" if i else ""), x, *layer)
        return x

    def a(self, name, x, pool):
        towers = [
            self.conv(f"{name}.conv", x, 64, (1, 1)),
            self.tower(f"{name}.tower", x, (48, (1, 1)), (64, (5, 5), 1, 2)),
            self.tower(f"{name}.tower_1", x, (64, (1, 1)), (96, (3, 3), 1, 1), (96, (3, 3), 1, 1)),
            self.tower(f"{name}.tower_2", average(x), (pool, (1, 1))),
        ]
        return torch.cat(towers, 1)

    def c(self, name, x, inner):
        one, wide, tall = (inner, (1, 1)), (inner, (1, 7), 1, (0, 3)), (inner, (7, 1), 1, (3, 0))
        towers = [
            self.conv(f"{name}.conv", x, 192, (1, 1)),
            self.tower(f"{name}.tower", x, one, wide, (192, *tall[1:])),
            self.tower(f"{name}.tower_1", x, one, tall, wide, tall, (192, *wide[1:])),
            self.tower(f"{name}.tower_2", average(x), (192, (1, 1))),
        ]
        return torch.cat(towers, 1)

    def e(self, name, x, pool):
        one = self.conv(f"{name}.tower_conv", x, 384, (1, 1))
        two = self.conv(f"{name}.tower_1_conv_1", self.conv(f"{name}.tower_1_conv", x, 448, (1, 1)), 384, (3, 3), 1, 1)
        towers = [self.conv(f"{name}.conv", x, 320, (1, 1))]
        for tower, y in (("tower", one), ("tower_1", two)):
            towers.append(self.conv(f"{name}.{tower}_mixed_conv", y, 384, (1, 3), 1, (0, 1)))
            towers.append(self.conv(f"{name}.{tower}_mixed_conv_1", y, 384, (3, 1), 1, (1, 0)))
        return torch.cat([*towers, self.conv(f"{name}.tower_2_conv", pool(x), 192, (1, 1))], 1)

    @torch.inference_mode()
    def __call__(self, x):
        """Normalised images [n, 3, 299, 299] -> `pool_3` [n, 2048], `mixed_6/conv` [n, 17, 17, 192], logits without
        bias [n, 1008]."""
        x = self.conv("conv", x, 32, (3, 3), 2)
        x = self.conv("conv_2", self.conv("conv_1", x, 32, (3, 3)), 64, (3, 3), 1, 1)
        x = self.conv("conv_4", self.conv("conv_3", F.max_pool2d(x, 3, 2), 80, (1, 1)), 192, (3, 3))
        x = F.max_pool2d(x, 3, 2)
        for name, pool in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
            x = self.a(name, x, pool)
        small = self.tower("mixed_3.tower", x, (64, (1, 1)), (96, (3, 3), 1, 1), (96, (3, 3), 2))
        x = torch.cat([self.conv("mixed_3.conv", x, 384, (3, 3), 2), small, F.max_pool2d(x, 3, 2)], 1)
        for name, inner in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
            x = self.c(name, x, inner)
        one = self.tower("mixed_8.tower", x, (192, (1, 1)), (320, (3, 3), 2))
        two = self.tower(
            "mixed_8.tower_1", x, (192, (1, 1)), (192, (1, 7), 1, (0, 3)), (192, (7, 1), 1, (3, 0)), (192, (3, 3), 2)
        )
        x = torch.cat([one, two, F.max_pool2d(x, 3, 2)], 1)
        x = self.e("mixed_9", x, average)
        x = self.e("mixed_10", x, lambda y: F.max_pool2d(y, 3, 1, 1))
        features = x.mean((2, 3))
        weight = self.tensors.setdefault(
            "output.weight", torch.randn(1008, 2048, generator=self.generator) * 2048**-0.5
        )
        self.tensors.setdefault("output.bias", torch.randn(1008, generator=self.generator))
        return features, self.seen["layers.mixed_6.conv"].permute(0, 2, 3, 1), features @ weight.T


def average(x):
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
