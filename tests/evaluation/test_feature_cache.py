"""Features kept by the content of their volumes."""

import pytest
import torch
from safetensors import safe_open

from diffusers_med3d.evaluation import FeatureCache, VolumeSet, evaluate
from diffusers_med3d.metrics import MedicalNetFeatures, NamedExtractor, PlanarFeatures, ScatteringFeatures, features_of


class Counted(ScatteringFeatures):
    """How many volumes went through it."""

    volumes = 0

    def __call__(self, volumes):
        self.volumes += len(volumes)
        return super().__call__(volumes)


def volumes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


def named(name: str, count: int, seed: int) -> VolumeSet:
    return VolumeSet(volumes(count, seed), [0] * count, [f"{name}{i}" for i in range(count)])


@pytest.mark.slow
def test_a_second_evaluation_calls_no_extractor_and_gives_the_same_figures(tmp_path):
    def report(extractor, cache):
        sets = named("m", 6, 1), named("person", 6, 2), named("other", 8, 3)
        return evaluate({"m": sets[0]}, *sets[1:], [extractor], (3, 3, 3), num_resamples=20, neighbours=3, cache=cache)

    plain = report(Counted(levels=2), None)
    first, second = Counted(levels=2), Counted(levels=2)
    made, again = report(first, FeatureCache(tmp_path)), report(second, FeatureCache(tmp_path))
    assert (first.volumes, second.volumes) == (20, 0)
    assert plain.to_dict() == made.to_dict() == again.to_dict()
    (path,) = tmp_path.iterdir()  # whole, and nothing beside it
    assert b"person" not in path.read_bytes()


def test_only_new_volumes_go_through_an_extractor_and_equal_ones_once(tmp_path):
    first, known = Counted(levels=2), volumes(4)
    FeatureCache(tmp_path).features_of(first, known)
    extractor, more = Counted(levels=2), torch.cat([volumes(1, 9), known, volumes(1, 9)])
    found = FeatureCache(tmp_path).features_of(extractor, more)
    assert extractor.volumes == 1
    torch.testing.assert_close(found, features_of(ScatteringFeatures(levels=2), more))
    with safe_open(next(tmp_path.iterdir()), "pt") as file:
        assert len(file.get_tensor("features")) == 5


def test_other_settings_and_other_weights_are_other_extractors(tmp_path):
    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    extractors = [Counted(levels=2), Counted(levels=1)]
    extractors += [PlanarFeatures(network(seed), "own", num_slices=2, image_size=16) for seed in (0, 1)]
    extractors += [PlanarFeatures(network(0), "own", gain=2.0, num_slices=2, image_size=16)]
    three_d = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
    extractors.append(MedicalNetFeatures(network=three_d))
    for extractor in extractors:
        found = FeatureCache(tmp_path).features_of(extractor, volumes(2))
        torch.testing.assert_close(found, features_of(extractor, volumes(2)))
    assert len(list(tmp_path.iterdir())) == len(extractors)


def test_features_of_a_function_stay_in_memory_and_are_not_those_of_another_of_its_name(tmp_path):
    cache = FeatureCache(tmp_path)
    mean = NamedExtractor(lambda v: v.flatten(1).mean(1, keepdim=True), "mine")
    total = NamedExtractor(lambda v: v.flatten(1).sum(1, keepdim=True), "mine")
    assert not torch.allclose(cache.features_of(mean, volumes(2)), cache.features_of(total, volumes(2)))
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named(tmp_path):
    FeatureCache(tmp_path).features_of(Counted(levels=2), volumes(2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} holds no features that can be read .* delete it"):
        FeatureCache(tmp_path).features_of(Counted(levels=2), volumes(2))
