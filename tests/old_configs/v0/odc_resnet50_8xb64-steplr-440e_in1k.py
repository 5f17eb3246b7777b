_base_ = ['_base_/cluster_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

data = dict(replace=True)
model = dict(
    type='ODC',
    with_sobel=False,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(
        type='ODCNeck', in_channels=2048, hid_channels=512, out_channels=256, norm_cfg=dict(type='SyncBN'),
        with_avg_pool=True),
    head=dict(type='ClsHead', with_avg_pool=False, in_channels=256, num_classes={{_base_.num_classes}}),
    memory_bank=dict(
        type='ODCMemory', length=1281167, feat_dim=256, momentum=0.5, num_classes={{_base_.num_classes}},
        min_cluster=20, debug=False))
custom_hooks = [
    dict(
        type='DeepClusterHook',
        extractor={{_base_.extractor}},
        clustering=dict(type='Kmeans', k={{_base_.num_classes}}, pca_dim=-1),
        unif_sampling=False,
        reweight=True,
        reweight_pow=0.5,
        init_memory=True,
        initial=True,
        interval=9999999999),
    dict(
        type='ODCHook',
        centroids_update_interval=10,
        deal_with_small_clusters_interval=1,
        evaluate_interval=50,
        reweight=True,
        reweight_pow=0.5),
]
optimizer = dict(lr=0.06, weight_decay=1e-5, paramwise_options={'\\Ahead.': dict(momentum=0.)})
lr_config = dict(_delete_=True, policy='step', step=[400], gamma=0.4)
runner = dict(max_epochs=440)
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
