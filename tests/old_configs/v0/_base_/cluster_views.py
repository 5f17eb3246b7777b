# One view, for clusters: and how they are made, which is a hook there.
_base_ = 'source.py'
img_norm_cfg = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
to_tensor = [dict(type='ToTensor'), dict(type='Normalize', **img_norm_cfg)]
train_pipeline = [
    dict(type='RandomResizedCrop', size=224),
    dict(type='RandomHorizontalFlip'),
    dict(type='RandomRotation', degrees=2),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=1.0, hue=0.5),
    dict(type='RandomGrayscale', p=0.2),
] + to_tensor
extract_pipeline = [dict(type='Resize', size=256), dict(type='CenterCrop', size=224)] + to_tensor
data = dict(
    samples_per_gpu=64,
    workers_per_gpu=4,
    train=dict(type='DeepClusterDataset', data_source={{_base_.source}}, pipeline=train_pipeline))
num_classes = 10000
clustering = dict(type='Kmeans', k=num_classes, pca_dim=256)
extractor = dict(
    samples_per_gpu=128,
    workers_per_gpu=8,
    dataset=dict(type='DeepClusterDataset', data_source={{_base_.source}}, pipeline=extract_pipeline))
