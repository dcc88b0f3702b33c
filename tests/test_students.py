import pytest
import torch

from pile_fast.students import FeatureRanker, FeatureRankerConfig


def ranker(**config):
    torch.manual_seed(0)
    return FeatureRanker(FeatureRankerConfig(**{"num_features": 5, "hidden_sizes": (8, 4)} | config))


def test_logit_per_document():
    assert ranker()(torch.randn(7, 5)).shape == (7,)
    assert ranker(hidden_sizes=())(torch.randn(7, 5)).shape == (7,)
    assert ranker()(torch.randn(0, 5)).shape == (0,)


def test_save_and_load_round_trip_with_the_statistics(tmp_path):
    features = torch.randn(50, 5) * 3 + 7
    model = ranker(dropout=0.3).fit_standardization(features).eval()
    model.save_pretrained(tmp_path)
    again = FeatureRanker.from_pretrained(tmp_path)
    assert torch.equal(again.mean, model.mean) and torch.equal(again.scale, model.scale)
    assert torch.equal(again(features), model(features))  # dropout is off after loading
    assert (again.config.hidden_sizes, again.config.dropout) == ([8, 4], 0.3)


def test_standardisation_makes_scale_and_offset_of_the_features_irrelevant():
    features = torch.randn(200, 5)
    moved = features * torch.tensor([1, 10, 1e-3, 1e4, 2]) + torch.tensor([0, -5, 1, 1e5, 100.0])
    plain = ranker().eval().fit_standardization(features)
    other = ranker().eval().fit_standardization(moved)
    torch.testing.assert_close(other(moved), plain(features), rtol=1e-3, atol=1e-3)


def test_constant_feature_carries_nothing_but_does_no_harm():
    features = torch.randn(20, 5)
    features[:, 2] = 0.1  # its mean is not exact in floating point
    model = ranker().eval().fit_standardization(features)
    changed = features.clone()
    changed[:, 2] = 1e6
    assert torch.equal(model(changed), model(features)) and model(features).isfinite().all()


@pytest.mark.parametrize("shape", [(10, 4), (10,), (0, 5)])
def test_standardisation_names_what_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"features: expected \(D, F\) = \(D, 5\), D > 0, got"):
        ranker().fit_standardization(torch.zeros(shape))


def test_statistics_are_not_trained():
    assert not {"mean", "scale"} & {name for name, _ in ranker().named_parameters()}
