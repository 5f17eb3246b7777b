_base_ = ['../v0/_base_/source.py', '../v0/_base_/runtime.py']

model = dict(
    type='MAE',
    backbone=dict(type='MAEViT', arch='b', patch_size=16, mask_ratio=0.75),
    neck=dict(
        type='MAEPretrainDecoder', patch_size=16, in_chans=3, embed_dim=768, decoder_embed_dim=512, decoder_depth=8,
        decoder_num_heads=16, mlp_ratio=4.),
    head=dict(type='MAEPretrainHead', norm_pix=True, patch_size=16))
numbers = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
steps = [
    dict(type='RandomResizedCrop', size=224, scale=(0.2, 1.0), interpolation=3),
    dict(type='RandomHorizontalFlip'),
    dict(type='ToTensor'),
    dict(type='Normalize', **numbers),
]
data = dict(
    samples_per_gpu=512, workers_per_gpu=8, drop_last=True,
    train=dict(type='SingleViewDataset', data_source={{_base_.source}}, pipeline=steps, prefetch=False))
optimizer = dict(
    type='AdamW', lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05,
    paramwise_options={
        'norm': dict(weight_decay=0.), 'bias': dict(weight_decay=0.), 'pos_embed': dict(weight_decay=0.),
        'mask_token': dict(weight_decay=0.), 'cls_token': dict(weight_decay=0.)})
lr_config = dict(
    policy='StepFixCosineAnnealing', min_lr=0.0, warmup='linear', warmup_iters=40, warmup_ratio=1e-4,
    warmup_by_epoch=True, by_epoch=False)
runner = dict(type='EpochBasedRunner', max_epochs=800)
