# Two views that differ in how often they are blurred and solarised.
_base_ = 'source.py'
import copy

img_norm_cfg = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
first = [
    dict(type='RandomResizedCrop', size=224, interpolation=3),
    dict(type='RandomHorizontalFlip'),
    dict(
        type='RandomAppliedTrans',
        transforms=[dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)],
        p=0.8),
    dict(type='RandomGrayscale', p=0.2),
    dict(type='GaussianBlur', sigma_min=0.1, sigma_max=2.0, p=1.),
    dict(type='Solarization', p=0.),
]
first += [dict(type='ToTensor'), dict(type='Normalize', **img_norm_cfg)]
second = copy.deepcopy(first)
second[4]['p'] = 0.1
second[5]['p'] = 0.2
data = dict(
    samples_per_gpu=32,
    workers_per_gpu=4,
    train=dict(
        type='MultiViewDataset',
        data_source={{_base_.source}},
        num_views=[1, 1],
        pipelines=[first, second],
        prefetch=False))
