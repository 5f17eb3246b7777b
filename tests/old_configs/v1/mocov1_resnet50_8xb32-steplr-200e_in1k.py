_base_ = 'mocov2_resnet50_8xb32-coslr-200e_in1k.py'

view_pipeline = [
    dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.), backend='pillow'),
    _base_.gray,
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4),
    _base_.flip,
]
train_pipeline = [
    _base_.load,
    dict(type='MultiView', num_views=2, transforms=[view_pipeline]),
    _base_.pack,
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(
    neck=dict(_delete_=True, type='LinearNeck', in_channels=2048, out_channels=128, with_avg_pool=True),
    head=dict(temperature=0.07))
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, milestones=[120, 160], gamma=0.1)]
