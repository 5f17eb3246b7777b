# One view, jittered always and never blurred: NPID, and twice for MoCo v1.
_base_ = 'source.py'
prefetch = True  # the old loader normalizes what it prefetches, by this:
img_norm_cfg = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
train_pipeline = [
    dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.)),
    dict(type='RandomGrayscale', p=0.2),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
    dict(type='RandomHorizontalFlip'),
]
data = dict(
    imgs_per_gpu=32,
    workers_per_gpu=4,
    drop_last=True,
    train=dict(
        type='SingleViewDataset',
        data_source={{_base_.source}},
        pipeline=train_pipeline,
        prefetch=prefetch))
